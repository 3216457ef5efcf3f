// The hyperbolic tangent in single precision as 32 polynomials, whose coefficients a processor with
// registers of 16 numbers looks up in two of them: no division, and few operations after each
// other.
#pragma once

#include "lanes.h"

#if defined(__AVX512F__) && !defined(CT_CUDA)
namespace ct::native::tanh_detail {

// From 1/16 to 16 a power of two has four intervals; an interval is known by the low five of the
// bits of a number from the second of its mantissa on. In each, tanh(x) is the sum of c[k] t^k,
// t = x - at. The points `at` are near the middle, and such that c[0] = tanh(at) to far more than
// single precision; the other coefficients are a least squares fit of relative errors at Chebyshev
// points, below 3e-8. The interval before 1/16 stands for all below it (`at` is zero there), and
// from 10 on all is one.
// clang-format off
constexpr float kTable[7][32] = {  // at, c[0], ..., c[5]
    {0x1.1ff226p+1f, 0x1.5ff05ep+1f, 0x1.9feb98p+1f, 0x1.e01726p+1f, 0x1.2004d2p+2f,
     0x1.5fe8bep+2f, 0x1.9fef28p+2f, 0x1.e0177p+2f, 0x1.1fe89p+3f, 0x1.4p+3f,
     0, 0, 0x1.200c32p-4f, 0x1.5ff334p-4f, 0x1.9ffde6p-4f,
     0x1.e00434p-4f, 0x1.1ff20ep-3f, 0x1.6006ap-3f, 0x1.a01724p-3f, 0x1.e01738p-3f,
     0x1.1ff652p-2f, 0x1.600068p-2f, 0x1.9fefaap-2f, 0x1.e0167ep-2f, 0x1.1ff3a2p-1f,
     0x1.5ffc7cp-1f, 0x1.9fef8ap-1f, 0x1.dff95ap-1f, 0x1.20155cp+0f, 0x1.5fef1ep+0f,
     0x1.a01248p+0f, 0x1.dfe98p+0f},
    {0x1.f4bd6ep-1f, 0x1.fbd406p-1f, 0x1.fe75fcp-1f, 0x1.ff6f4cp-1f, 0x1.ffdfacp-1f,
     0x1.fffb9cp-1f, 0x1.ffff68p-1f, 0x1.ffffecp-1f, 0x1.fffffep-1f, 0x1p+0f,
     0x1p+0f, 0, 0x1.1f92ep-4f, 0x1.5f161ep-4f, 0x1.9e9142p-4f,
     0x1.ddd4b8p-4f, 0x1.1e1024p-3f, 0x1.5c9976p-3f, 0x1.9a7552p-3f, 0x1.d77c5ap-3f,
     0x1.189aa6p-2f, 0x1.52c322p-2f, 0x1.8a79f8p-2f, 0x1.bfc09cp-2f, 0x1.04ff48p-1f,
     0x1.31559cp-1f, 0x1.577ff2p-1f, 0x1.77d528p-1f, 0x1.9e6b72p-1f, 0x1.c27104p-1f,
     0x1.d9cc3cp-1f, 0x1.e87494p-1f},
    {0x1.645bfp-5f, 0x1.09e80cp-6f, 0x1.896c68p-8f, 0x1.213f24p-9f, 0x1.02995cp-11f,
     0x1.190002p-14f, 0x1.300142p-17f, 0x1.47a8e2p-20f, 0x1.09a42ep-24f, 0,
     0, 0x1p+0f, 0x1.fd79eap-1f, 0x1.fc3d04p-1f, 0x1.fac14cp-1f,
     0x1.f9083cp-1f, 0x1.f602cp-1f, 0x1.f12a74p-1f, 0x1.eb6f2p-1f, 0x1.e4dd2ap-1f,
     0x1.d98daap-1f, 0x1.c7f704p-1f, 0x1.b4048ap-1f, 0x1.9e1bbap-1f, 0x1.7af43cp-1f,
     0x1.49e972p-1f, 0x1.198bf2p-1f, 0x1.d83dd4p-2f, 0x1.61204ep-2f, 0x1.cedcf8p-3f,
     0x1.26374ep-3f, 0x1.700d5ap-4f},
    {-0x1.5c830ap-5f, -0x1.07b978p-6f, -0x1.8836a8p-8f, -0x1.20e7e4p-9f, -0x1.02357ep-11f,
     -0x1.18a2c8p-14f, -0x1.2f9e6ep-17f, -0x1.834b0ap-20f, 0x1.e09876p-25f, 0,
     0, 0, -0x1.1e27fcp-4f, -0x1.5c81bcp-4f, -0x1.9a5204p-4f,
     -0x1.d753f2p-4f, -0x1.187b5ep-3f, -0x1.527fdep-3f, -0x1.89f896p-3f, -0x1.be7f38p-3f,
     -0x1.03888p-2f, -0x1.2dafd6p-2f, -0x1.4fef5cp-2f, -0x1.6a24fcp-2f, -0x1.8259ep-2f,
     -0x1.897d7p-2f, -0x1.79c73cp-2f, -0x1.5aa5eap-2f, -0x1.1dd3bep-2f, -0x1.9736fep-3f,
     -0x1.1043bp-3f, -0x1.5f209ap-4f},
    {0x1.bc25e4p-6f, 0x1.59e6d2p-7f, 0x1.03e91ap-8f, 0x1.805a9ep-10f, 0x1.58293cp-12f,
     0x1.7649ccp-15f, 0x1.94f1f8p-18f, 0x1.aea4eep-21f, 0x1.42342ap-25f, 0,
     0, -0x1.555556p-2f, -0x1.4ea0bep-2f, -0x1.4b5b4p-2f, -0x1.47740ap-2f,
     -0x1.42f0f6p-2f, -0x1.3b15d4p-2f, -0x1.2ea298p-2f, -0x1.202498p-2f, -0x1.0fd8d4p-2f,
     -0x1.e92a9cp-3f, -0x1.985806p-3f, -0x1.42883ap-3f, -0x1.d6e30cp-4f, -0x1.bd8648p-5f,
     0x1.d6fdb6p-7f, 0x1.0702c4p-4f, 0x1.842b86p-4f, 0x1.c6946ap-4f, 0x1.97ef6ep-4f,
     0x1.33c1e6p-4f, 0x1.a8982ep-5f},
    {-0x1.962288p-7f, -0x1.51a946p-8f, -0x1.03924ep-9f, -0x1.830d34p-11f, -0x1.687bbep-13f,
     -0x1.88621ap-16f, -0x1.a89be6p-19f, 0x1.38f2dp-22f, -0x1.f7ba92p-24f, 0,
     0, 0, 0x1.79c10ap-5f, 0x1.c6308cp-5f, 0x1.0a8a5p-4f,
     0x1.3165f2p-4f, 0x1.6b23b8p-4f, 0x1.afa39ep-4f, 0x1.ed648ep-4f, 0x1.12060ap-3f,
     0x1.32de7cp-3f, 0x1.4fffe8p-3f, 0x1.5c0664p-3f, 0x1.583ab6p-3f, 0x1.39ecap-3f,
     0x1.e948dap-4f, 0x1.476a9ep-4f, 0x1.634a82p-5f, 0x1.da699ap-9f, -0x1.59b3ap-6f,
     -0x1.9ba8fcp-6f, -0x1.55bbd8p-6f},
    {0x1.04b2eep-8f, 0x1.f5febp-10f, 0x1.93ea18p-11f, 0x1.32f168p-12f, 0x1.1e86bp-14f,
     0x1.373beep-17f, 0x1.512fa4p-20f, 0x1.c5873p-23f, 0x1.a3e4c2p-27f, 0,
     0, 0x1.111112p-3f, 0x1.fd465cp-4f, 0x1.c8178cp-4f, 0x1.bdf404p-4f,
     0x1.ba9afep-4f, 0x1.cd0cf2p-4f, 0x1.a29918p-4f, 0x1.7300ecp-4f, 0x1.442928p-4f,
     0x1.e531d2p-5f, 0x1.069218p-5f, 0x1.8b5ap-8f, -0x1.17971p-6f, -0x1.6300e8p-5f,
     -0x1.f814a8p-5f, -0x1.00bf98p-4f, -0x1.b2e452p-5f, -0x1.07382ap-5f, -0x1.38ae14p-7f,
     0x1.6b881p-10f, 0x1.2d802cp-8f},
};
// clang-format on
constexpr uint32_t kFirst = 491u << 21;  // the bits of the number where the first interval begins
constexpr float kLast = 10;

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));

CT_LANES Floats look_up(const float (&table)[32], Bits index) {
  const Floats low = load<Floats>(table), high = load<Floats>(table + 16);
#if defined(__clang__)
  return __builtin_ia32_vpermi2varps512(low, index, high);
#else
  return __builtin_shuffle(low, high, index);
#endif
}

CT_LANES Floats tanh_by_table(Floats x) {
  Floats size = (Floats)((Bits)x & 0x7fffffffu);
  size = kLast < size ? Floats{} + kLast : size;
  const Bits bits = (Bits)size, index = (bits > kFirst ? bits : Bits{} + kFirst) >> 21;
  const Floats t = size - look_up(kTable[0], index), square = t * t;
  const Floats low = look_up(kTable[2], index) * t + look_up(kTable[1], index);
  const Floats middle = look_up(kTable[4], index) * t + look_up(kTable[3], index);
  const Floats high = look_up(kTable[6], index) * t + look_up(kTable[5], index);
  const Floats y = (high * square + middle) * square + low;
  return (Floats)((Bits)y | ((Bits)x & 0x80000000u));
}

}  // namespace ct::native::tanh_detail
#endif
