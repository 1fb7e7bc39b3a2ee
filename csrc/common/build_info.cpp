// What this library was built with, as JSON: setup.py passes the text.
// The marker lets fastkd/native.py find it in a file that does not load.
namespace {
constexpr char kMarker[] = "fastkd-build-info:";
__attribute__((used)) const char kInfo[] = "fastkd-build-info:" FASTKD_BUILD_INFO;
}  // namespace

extern "C" __attribute__((visibility("default"))) const char* fastkd_build_info() {
  return kInfo + sizeof(kMarker) - 1;
}
