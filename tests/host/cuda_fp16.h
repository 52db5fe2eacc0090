// float16 and bfloat16 for the host: their bits, and the conversions by name.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

// FRACTION bits of fraction; the least normal number is 2^LEAST.
template <int FRACTION, int LEAST>
struct SmallFloat {
  static constexpr uint16_t INFINITY_BITS = 0x7fff >> FRACTION << FRACTION;
  uint16_t bits;

  static SmallFloat rounded(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (std::isnan(value)) return {0x7fff};
    if (std::isinf(value)) return {static_cast<uint16_t>(sign | INFINITY_BITS)};
    const int exponent = size == 0 ? LEAST : std::max(std::ilogb(size), LEAST);
    // The fraction with its leading 1, which adds 1 to the exponent's bits, as a carry does.
    const auto fraction = static_cast<int>(std::nearbyint(std::ldexp(size, FRACTION - exponent)));
    const int bits = std::min(((exponent - LEAST) << FRACTION) + fraction, int{INFINITY_BITS});
    return {static_cast<uint16_t>(sign | bits)};
  }

  float value() const {
    const int size = bits & 0x7fff, exponent = size >> FRACTION;
    const int fraction = size - (exponent << FRACTION);
    float value = std::ldexp(static_cast<float>(exponent ? fraction + (1 << FRACTION) : fraction),
                             std::max(exponent - 1, 0) + LEAST - FRACTION);
    if (size >= INFINITY_BITS) value = size > INFINITY_BITS ? NAN : INFINITY;
    return bits & 0x8000 ? -value : value;
  }
};

using __half = SmallFloat<10, -14>;
using __nv_bfloat16 = SmallFloat<7, -126>;

inline float __half2float(__half value) { return value.value(); }
inline float __bfloat162float(__nv_bfloat16 value) { return value.value(); }
inline __half __float2half_rn(float value) { return __half::rounded(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16::rounded(value); }
