// Rows times packed NVFP4 weights, expert by expert:
//
//     y[s, n] = round(sum over k of x[s / top, k] * code[e, n, k] * block_scale[e, n, k / 16] * factors),  e = ids[s]
//
// Code times block scale is exact in fp32, sums are fp32, and the factors (global scale of the row, scale of the
// expert's activations) multiply the sum once. A row's sum has the same order whatever other rows there are.
//
// A step is 2 * W elements of K: W bytes of codes, whose low nibbles hold the even elements and whose high nibbles the
// odd ones. Activations are laid out in that order once, so that decoded codes need no interleaving.

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 16;      // elements of one block scale
constexpr int64_t kTaskRows = 32;   // rows of a weight that one thread decodes at a time
constexpr int kRows = 4;            // rows of a weight in one tile
constexpr int kFewTokens = 3;       // so few decode into registers

const float kE2M1[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

struct E4M3 {
  float value[256];
  E4M3() {
    for (int b = 0; b < 256; ++b) {
      const int exponent = (b >> 3) & 15, mantissa = b & 7;
      float v = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
      if ((b & 127) == 127) v = NAN;
      value[b] = b & 128 ? -v : v;
    }
  }
};
const E4M3 kE4M3;

#if defined(CPU_CAPABILITY_AVX512)

const char* const kIsa = "AVX-512";
constexpr int W = 16;
constexpr int kTokens = 6;  // rows of x in one tile
using V = __m512;

inline V zero() { return _mm512_setzero_ps(); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline float total(V v) { return _mm512_reduce_add_ps(v); }

inline void decode(const uint8_t* codes, const uint8_t* scales, V& even, V& odd) {
  const V first = _mm512_set1_ps(kE4M3.value[scales[0]]), second = _mm512_set1_ps(kE4M3.value[scales[1]]);
  const V scale = _mm512_mask_blend_ps(0xFF00, first, second), table = _mm512_loadu_ps(kE2M1);
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  // The permutation looks at the low four bits of an index only.
  even = _mm512_mul_ps(_mm512_permutexvar_ps(bytes, table), scale);
  odd = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table), scale);
}

#elif defined(CPU_CAPABILITY_AVX2)

const char* const kIsa = "AVX2";
constexpr int W = 8;
constexpr int kTokens = 3;
using V = __m256;

inline V zero() { return _mm256_setzero_ps(); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline float total(V v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline V value(__m256i codes, V scale) {
  // The permutation looks at the low three bits of an index, the magnitude; the fourth becomes the sign.
  const V magnitude = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kE2M1), codes);
  const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(codes, 3), 31);
  return _mm256_mul_ps(_mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign)), scale);
}

inline void decode(const uint8_t* codes, const uint8_t* scales, V& even, V& odd) {
  const V scale = _mm256_set1_ps(kE4M3.value[scales[0]]);
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  even = value(bytes, scale);
  odd = value(_mm256_srli_epi32(bytes, 4), scale);
}

#else

const char* const kIsa = "any CPU";
constexpr int W = 8;
constexpr int kTokens = 3;
struct V {
  float lane[W];
};

inline V zero() { return V{}; }
inline V load(const float* p) {
  V v;
  std::memcpy(v.lane, p, sizeof(v.lane));
  return v;
}
inline void store(float* p, const V& v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
inline V fma(const V& a, const V& b, V c) {
  for (int i = 0; i < W; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
inline float total(const V& v) {
  float sum = 0;
  for (float lane : v.lane) sum += lane;
  return sum;
}

inline void decode(const uint8_t* codes, const uint8_t* scales, V& even, V& odd) {
  const float scale = kE4M3.value[scales[0]];
  for (int i = 0; i < W; ++i) {
    even.lane[i] = kE2M1[codes[i] & 15] * scale;
    odd.lane[i] = kE2M1[codes[i] >> 4] * scale;
  }
}

#endif

constexpr int64_t kStep = 2 * W;
constexpr int64_t kStepScales = kStep / kBlock;
static_assert(kStep % kBlock == 0, "a step holds whole blocks");

// One row of a packed weight, [K].
struct PackedRow {
  const uint8_t* codes;
  const uint8_t* scales;

  void at(int64_t step, V& even, V& odd) const { decode(codes + step * W, scales + step * kStepScales, even, odd); }

  // The step that reaches past K: what lies beyond it counts as zero.
  void last(int64_t step, int64_t k, V& even, V& odd) const {
    uint8_t padded[W] = {}, padded_scales[kStepScales] = {};
    std::memcpy(padded, codes + step * W, (k - step * kStep) / 2);
    std::memcpy(padded_scales, scales + step * kStepScales, (k - step * kStep) / kBlock);
    decode(padded, padded_scales, even, odd);
  }
};

}  // namespace

// Mirrored by fx_nvfp4/cpu/library.py. Strides count elements; the innermost of x, codes and scales is 1.
struct Product {
  const void* x;  // [rows, K] of dtype
  const uint8_t* codes;  // [E, N, K / 2]
  const uint8_t* scales;  // [E, N, K / 16], bytes of float8_e4m3fn
  const float* row_scale;  // [E, N]
  const float* expert_scale;  // [E], or null for ones
  const float* bias;  // [E, N], added to the rounded product and rounded again; or null
  const int64_t* ids;  // [slots], those outside 0..E-1 belong to nobody; null: all slots to expert 0
  void* y;  // [slots, N] of dtype, contiguous
  int64_t x_row, codes_expert, codes_row, scales_expert, scales_row, row_scale_expert, row_scale_row;
  int64_t expert_scale_expert, bias_expert, bias_row;
  int64_t slots, top, experts, n, k;  // x has slots / top rows
  int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int64_t threads;
};

namespace {

// Memory for floats at a cache line's boundary.
struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], Free>;
Floats allocate(int64_t count) {
  return Floats(static_cast<float*>(::operator new[](std::max<int64_t>(count, 1) * sizeof(float), std::align_val_t(64))));
}

// Slots sorted by expert: those of the i-th expert that is hit are slots[begin[i] .. begin[i + 1]].
struct Routing {
  std::vector<int64_t> slots, experts, begin;

  explicit Routing(const Product& p) {
    std::vector<int64_t> next(p.experts + 1, 0);
    for (int64_t s = 0; s < p.slots; ++s)
      if (inside(p, s)) ++next[expert(p, s) + 1];
    for (int64_t e = 0; e < p.experts; ++e) {
      if (next[e + 1]) {
        experts.push_back(e);
        begin.push_back(next[e]);
      }
      next[e + 1] += next[e];
    }
    begin.push_back(next[p.experts]);
    slots.resize(next[p.experts]);
    for (int64_t s = 0; s < p.slots; ++s)
      if (inside(p, s)) slots[next[expert(p, s)]++] = s;
  }

  static int64_t expert(const Product& p, int64_t s) { return p.ids ? p.ids[s] : 0; }
  static bool inside(const Product& p, int64_t s) { return expert(p, s) >= 0 && expert(p, s) < p.experts; }
};

// Calls body(index) for 0 .. count - 1, each thread with a copy of body of its own.
template <class Body>
void parallel(int64_t count, int64_t threads, const Body& body) {
#pragma omp parallel num_threads(static_cast<int>(std::max<int64_t>(1, std::min(threads, count))))
  {
    Body own(body);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) own(i);
  }
}

// x in fp32, each step's even elements before its odd ones, padded with zeros to whole steps.
template <class T>
Floats arrange(const Product& p, int64_t padded) {
  const int64_t rows = p.slots / p.top;
  Floats out = allocate(rows * padded);
  float* const base = out.get();
  parallel(rows, rows * p.k < 1 << 15 ? 1 : p.threads, [&p, base, padded](int64_t row) {
    const T* const from = static_cast<const T*>(p.x) + row * p.x_row;
    float* to = base + row * padded;
    const int64_t whole = p.k / kStep * kStep;
    for (int64_t k = 0; k < whole; k += kStep, to += kStep)
      for (int i = 0; i < W; ++i) {
        to[i] = static_cast<float>(from[k + 2 * i]);
        to[W + i] = static_cast<float>(from[k + 2 * i + 1]);
      }
    for (int64_t i = 0; whole + i < padded; ++i)
      to[i % 2 * W + i / 2] = whole + i < p.k ? static_cast<float>(from[whole + i]) : 0.f;
  });
  return out;
}

// The part of the product that belongs to one expert and at most kTaskRows rows of its weight.
template <class T>
class Task {
 public:
  Task(const Product& p, const Routing& routing, const float* x, int64_t padded)
      : p_(p), routing_(routing), x_(x), padded_(padded) {}
  Task(const Task& other) : Task(other.p_, other.routing_, other.x_, other.padded_) {}

  void operator()(int64_t index) {
    const int64_t parts = (p_.n + kTaskRows - 1) / kTaskRows, hit = index / parts;
    first_row_ = index % parts * kTaskRows;
    end_row_ = std::min(first_row_ + kTaskRows, p_.n);
    expert_ = routing_.experts[hit];
    const int64_t* const slots = &routing_.slots[routing_.begin[hit]];
    const int64_t count = routing_.begin[hit + 1] - routing_.begin[hit];
    if (count <= kFewTokens) return tokens<true>(slots, count);
    decode_rows();
    // Tiles of nearly equal height.
    const int64_t tiles = (count + kTokens - 1) / kTokens;
    for (int64_t i = 0; i < tiles; ++i)
      tokens<false>(slots + i * count / tiles, (i + 1) * count / tiles - i * count / tiles);
  }

 private:
  PackedRow packed(int64_t row) const {
    return {p_.codes + expert_ * p_.codes_expert + row * p_.codes_row,
            p_.scales + expert_ * p_.scales_expert + row * p_.scales_row};
  }

  void decode_rows() {
    if (!decoded_) decoded_ = allocate(kTaskRows * padded_);
    float* to = decoded_.get();
    for (int64_t row = first_row_; row < end_row_; ++row) {
      const PackedRow from = packed(row);
      V even, odd;
      for (int64_t step = 0; step < padded_ / kStep; ++step, to += kStep) {
        if (step < p_.k / kStep) from.at(step, even, odd);
        else from.last(step, p_.k, even, odd);
        store(to, even);
        store(to + W, odd);
      }
    }
  }

  template <bool kPacked, int M = kPacked ? kFewTokens : kTokens>
  void tokens(const int64_t* slots, int64_t count) {
    if constexpr (M > 1)
      if (count < M) return tokens<kPacked, M - 1>(slots, count);
    const float* x[M];
    for (int m = 0; m < M; ++m) x[m] = x_ + slots[m] / p_.top * padded_;
    for (int64_t row = first_row_; row < end_row_; row += kRows) {
      V sum[kRows][M];
      for (auto& of_row : sum)
        for (V& v : of_row) v = zero();
      if constexpr (kPacked) from_packed<M>(row, x, sum);
      else from_decoded<M>(row, x, sum);
      for (int64_t r = 0; r < std::min<int64_t>(kRows, end_row_ - row); ++r)
        for (int m = 0; m < M; ++m) static_cast<T*>(p_.y)[slots[m] * p_.n + row + r] = finished(sum[r][m], row + r);
    }
  }

  // Past the last row a tile repeats it, and nobody looks at the result.
  int64_t clamped(int64_t row) const { return std::min(row, end_row_ - 1); }

  template <int M>
  void from_packed(int64_t row, const float* const (&x)[M], V (&sum)[kRows][M]) const {
    PackedRow w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = packed(clamped(row + r));
    const int64_t whole = p_.k / kStep;
    V even, odd;
    for (int64_t step = 0; step < whole; ++step)
      for (int r = 0; r < kRows; ++r) {
        w[r].at(step, even, odd);
        add_step<M>(even, odd, x, step, sum[r]);
      }
    if (whole * kStep < p_.k)
      for (int r = 0; r < kRows; ++r) {
        w[r].last(whole, p_.k, even, odd);
        add_step<M>(even, odd, x, whole, sum[r]);
      }
  }

  template <int M>
  static void add_step(V even, V odd, const float* const (&x)[M], int64_t step, V (&sum)[M]) {
    for (int m = 0; m < M; ++m) {
      sum[m] = fma(even, load(x[m] + step * kStep), sum[m]);
      sum[m] = fma(odd, load(x[m] + step * kStep + W), sum[m]);
    }
  }

  template <int M>
  void from_decoded(int64_t row, const float* const (&x)[M], V (&sum)[kRows][M]) const {
    const float* w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = decoded_.get() + (clamped(row + r) - first_row_) * padded_;
    for (int64_t k = 0; k < padded_; k += W) {
      V v[M];
      for (int m = 0; m < M; ++m) v[m] = load(x[m] + k);
      for (int r = 0; r < kRows; ++r) {
        const V of_row = load(w[r] + k);
        for (int m = 0; m < M; ++m) sum[r][m] = fma(of_row, v[m], sum[r][m]);
      }
    }
  }

  T finished(V sum, int64_t row) const {
    float factor = p_.row_scale[expert_ * p_.row_scale_expert + row * p_.row_scale_row];
    if (p_.expert_scale) factor *= p_.expert_scale[expert_ * p_.expert_scale_expert];
    const T y = static_cast<T>(total(sum) * factor);
    if (!p_.bias) return y;
    return static_cast<T>(static_cast<float>(y) + p_.bias[expert_ * p_.bias_expert + row * p_.bias_row]);
  }

  const Product& p_;
  const Routing& routing_;
  const float* x_;
  int64_t padded_, expert_ = 0, first_row_ = 0, end_row_ = 0;
  Floats decoded_;
};

template <class T>
void product(const Product& p) {
  const Routing routing(p);
  if (static_cast<int64_t>(routing.slots.size()) < p.slots)
    for (int64_t s = 0; s < p.slots; ++s)
      if (!Routing::inside(p, s)) std::fill_n(static_cast<T*>(p.y) + s * p.n, p.n, T(0.f));
  const int64_t padded = (p.k + kStep - 1) / kStep * kStep, parts = (p.n + kTaskRows - 1) / kTaskRows;
  const Floats x = arrange<T>(p, padded);
  parallel(static_cast<int64_t>(routing.experts.size()) * parts, p.threads, Task<T>(p, routing, x.get(), padded));
}

}  // namespace

extern "C" const char* fx_nvfp4_isa() { return kIsa; }

// 0, or 1 where memory does not suffice.
extern "C" int fx_nvfp4_product(const Product* p) {
  try {
    if (p->dtype == 0) product<float>(*p);
    else if (p->dtype == 1) product<c10::BFloat16>(*p);
    else product<c10::Half>(*p);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
