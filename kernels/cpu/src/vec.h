// Sixteen lanes on three instruction sets, one vocabulary. Included once per instruction set, inside its namespace.
// F16: 16 floats, I16: 16 int32, B64: 64 bytes. Every operation is the same arithmetic whatever the call's row count.
#pragma once

[[maybe_unused]] static inline uint16_t to_bf16(float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
[[maybe_unused]] static inline float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

#if defined(FG_AVX512)

struct F16 { __m512 v; };
struct I16 { __m512i v; };
struct B64 { __m512i v; };

static inline F16 f_zero() { return {_mm512_setzero_ps()}; }
static inline F16 f_set1(float x) { return {_mm512_set1_ps(x)}; }
static inline F16 f_load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void f_store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
static inline F16 f_add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F16 f_sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F16 f_mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F16 f_div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F16 f_fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F16 f_max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F16 f_min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F16 f_abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
static inline F16 f_round(F16 a) { return {_mm512_roundscale_ps(a.v, 0)}; }  // to nearest, ties to even
static inline F16 f_exp2i(F16 n) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), n.v)}; }  // 2^n, n whole
static inline F16 f_from_half(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
static inline F16 f_from_bf16(const void* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
static inline F16 f_from_i(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline I16 i_from_f(F16 a) { return {_mm512_cvtps_epi32(a.v)}; }
static inline I16 i_set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline void i_store_s8(int8_t* p, I16 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a.v)); }
static inline int32_t i_sum(I16 a) { return _mm512_reduce_add_epi32(a.v); }
static inline B64 b_load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline B64 b_low(B64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
static inline B64 b_high(B64 a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
static inline void f_store_bf16(void* p, F16 a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
static inline I16 i_add(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline I16 i_sub(I16 a, I16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
// High nibbles left where they are: their sums are 16 times too large, and one shift of those is cheaper.
static inline B64 b_high_part(B64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8((char)0xf0))}; }
static inline I16 i_of_high_parts(I16 a) { return {_mm512_srai_epi32(a.v, 4)}; }
static inline B64 b_low_as_high_part(B64 a) { return b_high_part({_mm512_slli_epi16(a.v, 4)}); }
static inline I16 i_shift8(I16 a) { return {_mm512_slli_epi32(a.v, 8)}; }
static inline I16 i_round_shift8(I16 a) { return {_mm512_srai_epi32(_mm512_add_epi32(a.v, _mm512_set1_epi32(128)), 8)}; }
static inline I16 i_load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline I16 i_from_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
static inline I16 i_pairs_from_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p))}; }
static inline I16 i_low_of_pairs(I16 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff))}; }
static inline I16 i_high_of_pairs(I16 a) { return {_mm512_srli_epi32(a.v, 16)}; }
static inline I16 i_spread2(I16 a) { return {_mm512_or_si512(a.v, _mm512_slli_epi32(a.v, 16))}; }
static inline I16 i_spread4(I16 a) { return i_spread2({_mm512_or_si512(a.v, _mm512_slli_epi32(a.v, 8))}); }
static inline void b_store(uint8_t* p, B64 a) { _mm512_store_si512(p, a.v); }
// bytes a * step + base, where no product passes 255; step twice and base four times in each lane
static inline B64 b_affine(B64 a, I16 step, I16 base) {
    return {_mm512_add_epi8(_mm512_mullo_epi16(a.v, step.v), base.v)};
}
// acc[l] += sum over j of u8 w[4 l + j] * s8 x[j]
// Written out: from the intrinsic GCC makes two moves between registers for each product.
static inline I16 dot4(I16 acc, B64 w, int32_t x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(_mm512_set1_epi32(x)));
    return acc;
}
static inline I16 dot4_small(I16 acc, B64 w, int32_t x) { return dot4(acc, w, x); }  // w below 128
static inline I16 dot4_high_part(I16 acc, B64 w, int32_t x) { return dot4(acc, w, x); }
// acc[l] += sum over j of s16 w[2 l + j] * s16 x[j]
static inline I16 dot2(I16 acc, I16 w, int32_t x) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(_mm512_set1_epi32(x)));
    return acc;
}

#elif defined(FG_AVX2)

struct F16 { __m256 a, b; };
struct I16 { __m256i a, b; };
struct B64 { __m256i a, b; };

static inline F16 f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F16 f_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F16 f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void f_store(float* p, F16 x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
static inline F16 f_add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F16 f_sub(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline F16 f_mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F16 f_div(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline F16 f_fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline F16 f_max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline F16 f_min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline F16 f_abs(F16 x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
static inline F16 f_round(F16 x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
static inline __m256 f8_exp2i(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline F16 f_exp2i(F16 n) { return {f8_exp2i(n.a), f8_exp2i(n.b)}; }
static inline F16 f_from_half(const void* p) {
    const __m128i* q = (const __m128i*)p;
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
static inline __m256 f8_from_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
static inline F16 f_from_bf16(const void* p) {
    const __m128i* q = (const __m128i*)p;
    return {f8_from_bf16(_mm_loadu_si128(q)), f8_from_bf16(_mm_loadu_si128(q + 1))};
}
static inline F16 f_from_i(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline I16 i_from_f(F16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
static inline I16 i_set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline void i_store_s8(int8_t* p, I16 x) {
    alignas(32) int32_t t[16];
    _mm256_store_si256((__m256i*)t, x.a);
    _mm256_store_si256((__m256i*)(t + 8), x.b);
    for (int i = 0; i < 16; ++i) p[i] = (int8_t)t[i];
}
static inline int32_t i_sum(I16 x) {
    alignas(32) int32_t t[8];
    _mm256_store_si256((__m256i*)t, _mm256_add_epi32(x.a, x.b));
    return t[0] + t[1] + t[2] + t[3] + t[4] + t[5] + t[6] + t[7];
}
static inline B64 b_load(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
static inline B64 b_low(B64 x) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
static inline B64 b_high(B64 x) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), m)};
}
static inline void f_store_bf16(void* p, F16 x) {
    float t[16];
    f_store(t, x);
    uint16_t h[16];
    for (int i = 0; i < 16; ++i) h[i] = to_bf16(t[i]);
    memcpy(p, h, 32);
}
static inline I16 i_add(I16 x, I16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline I16 i_sub(I16 x, I16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
static inline I16 i_shift8(I16 x) { return {_mm256_slli_epi32(x.a, 8), _mm256_slli_epi32(x.b, 8)}; }
static inline I16 i_round_shift8(I16 x) {
    const __m256i half = _mm256_set1_epi32(128);
    return {_mm256_srai_epi32(_mm256_add_epi32(x.a, half), 8), _mm256_srai_epi32(_mm256_add_epi32(x.b, half), 8)};
}
static inline I16 i_load(const int32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
static inline I16 i_from_u8(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
static inline I16 i_pairs_from_u8(const uint8_t* p) {
    const __m128i* q = (const __m128i*)p;
    return {_mm256_cvtepu8_epi16(_mm_loadu_si128(q)), _mm256_cvtepu8_epi16(_mm_loadu_si128(q + 1))};
}
static inline I16 i_low_of_pairs(I16 x) {
    const __m256i m = _mm256_set1_epi32(0xffff);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
static inline I16 i_high_of_pairs(I16 x) { return {_mm256_srli_epi32(x.a, 16), _mm256_srli_epi32(x.b, 16)}; }
static inline I16 i_spread(I16 x, int bits) {
    return {_mm256_or_si256(x.a, _mm256_slli_epi32(x.a, bits)), _mm256_or_si256(x.b, _mm256_slli_epi32(x.b, bits))};
}
static inline I16 i_spread2(I16 x) { return i_spread(x, 16); }
static inline I16 i_spread4(I16 x) { return i_spread(i_spread(x, 8), 16); }
static inline void b_store(uint8_t* p, B64 x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)(p + 32), x.b);
}
static inline B64 b_affine(B64 x, I16 step, I16 base) {
    return {_mm256_add_epi8(_mm256_mullo_epi16(x.a, step.a), base.a), _mm256_add_epi8(_mm256_mullo_epi16(x.b, step.b), base.b)};
}
static inline I16 dot2(I16 acc, I16 w, int32_t x) {
    const __m256i xs = _mm256_set1_epi32(x);
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(w.a, xs)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(w.b, xs))};
}
static inline I16 dot4_small(I16 acc, B64 w, int32_t x) {
    const __m256i xs = _mm256_set1_epi32(x), ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, xs), ones)),
            _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, xs), ones))};
}
// pairs are added in 16 bits, which u8 * s8 can overflow: split each weight into a part below 128 and its top bit
static inline __m256i dot4_half(__m256i acc, __m256i w, __m256i x) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(127);
    const __m256i below = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(w, low), x), ones);
    const __m256i top = _mm256_and_si256(_mm256_srli_epi16(w, 7), _mm256_set1_epi8(1));
    const __m256i above = _mm256_madd_epi16(_mm256_maddubs_epi16(top, x), ones);
    return _mm256_add_epi32(acc, _mm256_add_epi32(below, _mm256_slli_epi32(above, 7)));
}
static inline I16 dot4(I16 acc, B64 w, int32_t x) {
    const __m256i xs = _mm256_set1_epi32(x);
    return {dot4_half(acc.a, w.a, xs), dot4_half(acc.b, w.b, xs)};
}

#else  // portable

struct F16 { float v[16]; };
struct I16 { int32_t v[16]; };
struct B64 { uint8_t v[64]; };
#define FG_LANES for (int i = 0; i < 16; ++i)

static inline F16 f_set1(float x) { F16 r; FG_LANES r.v[i] = x; return r; }
static inline F16 f_zero() { return f_set1(0.0f); }
static inline F16 f_load(const float* p) { F16 r; memcpy(r.v, p, 64); return r; }
static inline void f_store(float* p, F16 a) { memcpy(p, a.v, 64); }
static inline F16 f_add(F16 a, F16 b) { FG_LANES a.v[i] += b.v[i]; return a; }
static inline F16 f_sub(F16 a, F16 b) { FG_LANES a.v[i] -= b.v[i]; return a; }
static inline F16 f_mul(F16 a, F16 b) { FG_LANES a.v[i] *= b.v[i]; return a; }
static inline F16 f_div(F16 a, F16 b) { FG_LANES a.v[i] /= b.v[i]; return a; }
static inline F16 f_fma(F16 a, F16 b, F16 c) { FG_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
static inline F16 f_max(F16 a, F16 b) { FG_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
static inline F16 f_min(F16 a, F16 b) { FG_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
static inline F16 f_abs(F16 a) { FG_LANES a.v[i] = fabsf(a.v[i]); return a; }
static inline F16 f_round(F16 a) { FG_LANES a.v[i] = nearbyintf(a.v[i]); return a; }
static inline F16 f_exp2i(F16 n) { FG_LANES n.v[i] = ldexpf(1.0f, (int)n.v[i]); return n; }
static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    uint32_t bits;
    if (exponent == 0) {
        float f = ldexpf((float)mantissa, -24);
        memcpy(&bits, &f, 4);
    } else {
        bits = (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | mantissa << 13;
    }
    bits |= sign;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline F16 f_from_half(const void* p) {
    uint16_t h[16];
    memcpy(h, p, 32);
    F16 r;
    FG_LANES r.v[i] = half_to_float(h[i]);
    return r;
}
static inline F16 f_from_bf16(const void* p) {
    uint16_t h[16];
    memcpy(h, p, 32);
    F16 r;
    FG_LANES { uint32_t bits = (uint32_t)h[i] << 16; memcpy(&r.v[i], &bits, 4); }
    return r;
}
static inline F16 f_from_i(I16 a) { F16 r; FG_LANES r.v[i] = (float)a.v[i]; return r; }
static inline I16 i_from_f(F16 a) { I16 r; FG_LANES r.v[i] = (int32_t)nearbyintf(a.v[i]); return r; }
static inline I16 i_set1(int32_t x) { I16 r; FG_LANES r.v[i] = x; return r; }
static inline void i_store_s8(int8_t* p, I16 a) { FG_LANES p[i] = (int8_t)a.v[i]; }
static inline int32_t i_sum(I16 a) { int32_t s = 0; FG_LANES s += a.v[i]; return s; }
static inline B64 b_load(const uint8_t* p) { B64 r; memcpy(r.v, p, 64); return r; }
static inline B64 b_low(B64 a) { for (int i = 0; i < 64; ++i) a.v[i] &= 15; return a; }
static inline B64 b_high(B64 a) { for (int i = 0; i < 64; ++i) a.v[i] >>= 4; return a; }
static inline void f_store_bf16(void* p, F16 a) {
    uint16_t h[16];
    FG_LANES h[i] = to_bf16(a.v[i]);
    memcpy(p, h, 32);
}
static inline I16 i_add(I16 a, I16 b) { FG_LANES a.v[i] += b.v[i]; return a; }
static inline I16 i_sub(I16 a, I16 b) { FG_LANES a.v[i] -= b.v[i]; return a; }
static inline I16 i_shift8(I16 a) { FG_LANES a.v[i] *= 256; return a; }
static inline I16 i_round_shift8(I16 a) { FG_LANES a.v[i] = (a.v[i] + 128) >> 8; return a; }
static inline I16 i_load(const int32_t* p) { I16 r; memcpy(r.v, p, 64); return r; }
static inline I16 i_from_u8(const uint8_t* p) { I16 r; FG_LANES r.v[i] = p[i]; return r; }
static inline I16 i_pairs_from_u8(const uint8_t* p) { I16 r; FG_LANES r.v[i] = p[2 * i] | p[2 * i + 1] << 16; return r; }
static inline I16 i_low_of_pairs(I16 a) { FG_LANES a.v[i] &= 0xffff; return a; }
static inline I16 i_high_of_pairs(I16 a) { FG_LANES a.v[i] = (int32_t)((uint32_t)a.v[i] >> 16); return a; }
static inline I16 i_spread2(I16 a) { return a; }  // b_affine reads the lowest
static inline I16 i_spread4(I16 a) { return a; }
static inline void b_store(uint8_t* p, B64 a) { memcpy(p, a.v, 64); }
static inline B64 b_affine(B64 a, I16 step, I16 base) {
    for (int i = 0; i < 64; ++i) a.v[i] = (uint8_t)(a.v[i] * step.v[i / 4] + base.v[i / 4]);
    return a;
}
static inline I16 dot2(I16 acc, I16 w, int32_t x) {
    FG_LANES acc.v[i] += (int16_t)w.v[i] * (int16_t)x + (w.v[i] >> 16) * (x >> 16);
    return acc;
}
static inline I16 dot4(I16 acc, B64 w, int32_t x) {
    int8_t s[4];
    memcpy(s, &x, 4);
    FG_LANES acc.v[i] += w.v[4 * i] * s[0] + w.v[4 * i + 1] * s[1] + w.v[4 * i + 2] * s[2] + w.v[4 * i + 3] * s[3];
    return acc;
}
static inline I16 dot4_small(I16 acc, B64 w, int32_t x) { return dot4(acc, w, x); }
#undef FG_LANES

#endif

#if !defined(FG_AVX512)
static inline B64 b_high_part(B64 a) { return b_high(a); }
static inline I16 i_of_high_parts(I16 a) { return a; }
static inline I16 dot4_high_part(I16 acc, B64 w, int32_t x) { return dot4_small(acc, w, x); }
#endif

// Sums and maxima over lanes, in one fixed order for every instruction set.
static inline float f_sum(F16 a) {
    float t[16];
    f_store(t, a);
    for (int step = 8; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) t[i] += t[i + step];
    return t[0];
}
static inline float f_top(F16 a) {
    float t[16];
    f_store(t, a);
    float m = t[0];
    for (int i = 1; i < 16; ++i) m = t[i] > m ? t[i] : m;
    return m;
}

// e^x to about 2 units in the last place, x clamped to -87..88 (Cephes' polynomial, Moshier).
static inline F16 f_exp(F16 x) {
    const F16 low = f_set1(-87.0f);
    F16 clamped = f_min(f_max(x, low), f_set1(88.0f));
    F16 n = f_round(f_mul(clamped, f_set1(1.44269504088896341f)));
    F16 r = f_fma(n, f_set1(-0.693359375f), clamped);
    r = f_fma(n, f_set1(2.12194440e-4f), r);
    F16 p = f_set1(1.9875691500e-4f);
    p = f_fma(p, r, f_set1(1.3981999507e-3f));
    p = f_fma(p, r, f_set1(8.3334519073e-3f));
    p = f_fma(p, r, f_set1(4.1665795894e-2f));
    p = f_fma(p, r, f_set1(1.6666665459e-1f));
    p = f_fma(p, r, f_set1(5.0000001201e-1f));
    p = f_add(f_fma(p, f_mul(r, r), r), f_set1(1.0f));
    return f_mul(p, f_exp2i(n));
}
