// Every kernel source is compiled once per instruction set, with FOVEATE_ISA naming the set. The
// functions of a set live in the namespace of that name, so that no symbol is shared between sets
// (the linker would keep one copy for all, and a baseline machine could meet AVX2 code).
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define FOVEATE_HAS_AVX2_SET 1
#define FOVEATE_PER_ISA(...)    \
  namespace foveate::baseline { \
  __VA_ARGS__                   \
  }                             \
  namespace foveate::avx2 {     \
  __VA_ARGS__                   \
  }
#else
#define FOVEATE_HAS_AVX2_SET 0
#define FOVEATE_PER_ISA(...)    \
  namespace foveate::baseline { \
  __VA_ARGS__                   \
  }
#endif
