// What loops over numbers share: functions of vectors of float, or of one number where a vector is too much.

// A vector, or one number, from p on, as the second argument's type says.
template <typename T>
FASTKD_INLINE VecF at(const T* p, VecF) {
  return load<T, float>(p);
}
template <typename T>
FASTKD_INLINE float at(const T* p, float) {
  return to_acc<T, float>(*p);
}
FASTKD_INLINE void put(float* p, VecF v) { store<float, float>(p, v); }
FASTKD_INLINE void put(float* p, float v) { *p = v; }
FASTKD_INLINE VecF chosen(IntF where, VecF yes, VecF no) { return where ? yes : no; }
FASTKD_INLINE float chosen(bool where, float yes, float no) { return where ? yes : no; }
FASTKD_INLINE double lanes_sum(VecF v) {
  VecD low, high;
  widen(v, low, high);
  return sum(low + high);
}
FASTKD_INLINE double lanes_sum(float x) { return x; }

// e^x to two units in the last place: 0 and infinity where it leaves float's range, and NaN for NaN.
FASTKD_INLINE VecF exponential(VecF x) {
  x = x > 100.0f ? broadcast(100.0f) : x;
  x = x < -110.0f ? broadcast(-110.0f) : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
  const VecF shifted = x * 1.44269504f + kRound, power = shifted - kRound;
  const VecF rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;  // ln 2 in two parts
  VecF y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * (rest * rest) + rest + 1.0f;
  const IntF whole = (IntF)shifted - 0x4B400000, half = whole >> 1;  // in two factors: 2^145 is no float
  return y * (VecF)((half + 127) << 23) * (VecF)((whole - half + 127) << 23);
}

// log(1 + u) for u >= 0, relative to the result as exact as float allows; infinity and NaN for themselves.
// `inverse` is 1 / (1 + u).
FASTKD_INLINE VecF log_of_one_plus(VecF u, VecF inverse) {
  const VecF w = u + 1.0f, lost = u - (w - 1.0f);
  IntF bits = (IntF)w - 0x3F3504F3;  // of the root of 1/2
  const VecF power = __builtin_convertvector(bits >> 23, VecF);
  bits = (bits & 0x007FFFFF) + 0x3F3504F3;
  const VecF f = (VecF)bits - 1.0f, square = f * f;
  VecF y = f * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * square - power * 2.12194440e-4f - 0.5f * square + lost * inverse;
  y = f + y + power * 0.693359375f;
  return u < 3.0e38f ? y : u;
}
