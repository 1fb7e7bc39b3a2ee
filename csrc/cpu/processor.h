// What kind of processor is compiled for, and which code paths exist there.
#pragma once

// Code paths with AVX exist on x86-64, for GCC and for clang from 16 on. AMX's registers must be requested
// from the operating system, and only the request for Linux is written.
#if defined(__x86_64__) && defined(__GNUC__) && (!defined(__clang__) || __clang_major__ >= 16)
#define FASTKD_X86 1
#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define FASTKD_AMX 1
#endif
#endif

// The path "neon" exists on aarch64.
#if defined(__aarch64__) && defined(__GNUC__) && !defined(__AARCH64EB__)
#define FASTKD_ARM 1
#endif
