// Rows times packed NVFP4 weights, expert by expert:
//
//     y[s, n] = round(sum over k of x[s / top, k] * code[e, n, k] * block_scale[e, n, k / 16] * factors),  e = ids[s]
//
// Code times block scale is exact in fp32, sums are fp32, and the factors (global scale of the row, scale of the
// expert's activations) multiply the sum once. A row's sum has the same order whatever other rows there are.
//
// A step is 2 * W elements of K: W bytes of codes, whose low nibbles hold the even elements and whose high nibbles the
// odd ones. In fp32, activations are laid out once in that order, so that decoded codes need no interleaving; pairs of
// bf16 have both elements of a byte in one lane, and take activations as they are.

// Inductor turns this off, as it writes out vectors itself; here plain loops convert and round.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")
#endif

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 16;      // elements of one block scale
constexpr int64_t kTaskRows = 32;   // rows of a weight that one thread decodes at a time
constexpr int kRows = 4;            // rows of a weight in one tile, as totals() sums them up
constexpr int kFewTokens = 3;       // so few decode into registers
constexpr int64_t kSerial = 1 << 15;  // elements that are not worth a second thread
constexpr int64_t kSumColumns = 512;

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

#if defined(__AVX512BF16__)
const char* const kIsa = "AVX-512 with bf16 products";
#else
const char* const kIsa = "AVX-512";
#endif
constexpr int W = 16;
constexpr int kTokens = 6;  // rows of x in one tile
using V = __m512;

inline V zero() { return _mm512_setzero_ps(); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline void totals(const V (&v)[4], float* out) {
  const V a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const V b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  // Each quarter of c holds a part of all four sums.
  const V c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

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
inline void totals(const V (&v)[4], float* out) {
  const V c = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1)));
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
inline void totals(const V (&v)[4], float* out) {
  for (int r = 0; r < 4; ++r) {
    out[r] = 0;
    for (float lane : v[r].lane) out[r] += lane;
  }
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

// How activations and decoded codes meet: kVectors vectors a step, of 32-bit lanes, whatever these hold.
struct Fp32 {
  static constexpr int kVectors = 2;

  static void decoded(const uint8_t* codes, const uint8_t* scales, V (&w)[kVectors]) {
    decode(codes, scales, w[0], w[1]);
  }

  static V add_product(V w, V x, V sum) { return fma(w, x, sum); }

  // One step of a row, elements past count as zeros.
  template <class T>
  static void arranged(const T* from, int64_t count, float* to) {
    for (int64_t i = 0; i < W; ++i) {
      to[i] = 2 * i < count ? static_cast<float>(from[2 * i]) : 0.f;
      to[W + i] = 2 * i + 1 < count ? static_cast<float>(from[2 * i + 1]) : 0.f;
    }
  }
};

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)

// Products of pairs are exact, and added one after the other in fp32. Numbers below 2^-126 count as zero.
struct Bf16Pairs {
  static constexpr int kVectors = 1;

  static void decoded(const uint8_t* codes, const uint8_t* scales, V (&w)[kVectors]) {
    V even, odd;
    decode(codes, scales, even, odd);
    // The upper halves, which hold all that is not zero.
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    w[0] = _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_castps_si512(odd)));
  }

  static V add_product(V w, V x, V sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }

  static void arranged(const c10::BFloat16* from, int64_t count, float* to) {
    std::memcpy(to, from, count * sizeof(*from));
    std::memset(reinterpret_cast<char*>(to) + count * sizeof(*from), 0, W * sizeof(*to) - count * sizeof(*from));
  }
};

template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, c10::BFloat16>, Bf16Pairs, Fp32>;

#else

template <class T>
using Arithmetic = Fp32;

#endif

// One row of a packed weight, [K].
struct PackedRow {
  const uint8_t* codes;
  const uint8_t* scales;

  // A step; what lies beyond K counts as zero.
  template <class A>
  void at(int64_t step, int64_t k, V (&w)[A::kVectors]) const {
    const uint8_t *c = codes + step * W, *s = scales + step * kStepScales;
    if ((step + 1) * kStep <= k) return A::decoded(c, s, w);
    uint8_t padded[W] = {}, padded_scales[kStepScales] = {};
    std::memcpy(padded, c, (k - step * kStep) / 2);
    std::memcpy(padded_scales, s, (k - step * kStep) / kBlock);
    A::decoded(padded, padded_scales, w);
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

// Activations rounded by the hardware's rule to code * block scale, without the scale of the row's group.
struct Rounding {
  const void* x;  // [rows, K] of dtype
  const int64_t* group;  // [rows], those outside 0..groups-1 are rounded somehow; null: all are of group 0
  const float* scale;  // [groups]
  const float* inverse;  // [groups], 1 / scale, rounded once from a double
  void* out;  // [rows, K] of dtype, contiguous
  int64_t x_row, rows, groups, k, dtype, threads;
};

// out[t] = sum over a of weights[t, a] * y[t * top + a] in fp32, without slots of nobody; all contiguous.
struct Sum {
  const void* y;  // [tokens * top, N] of dtype
  const int64_t* ids;  // [tokens, top]
  const float* weights;  // [tokens, top], or null for ones
  void* out;  // [tokens, N] of dtype
  int64_t tokens, top, experts, n, dtype, threads;
};

namespace {

// Memory for floats at a cache line's boundary.
struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], Free>;
Floats allocate(int64_t count) {
  void* const memory = ::operator new[](std::max<int64_t>(count, 1) * sizeof(float), std::align_val_t(64));
  return Floats(static_cast<float*>(memory));
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

// Calls body(index) for 0 .. count - 1, each thread with a copy of body of its own. No exception may leave the region
// of threads: memory that does not suffice is noted there, and thrown after it.
template <class Body>
void parallel(int64_t count, int64_t threads, const Body& body) {
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(static_cast<int>(std::max<int64_t>(1, std::min(threads, count))))
  {
    Body own(body);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      if (failed.load(std::memory_order_relaxed)) continue;
      try {
        own(i);
      } catch (const std::bad_alloc&) {
        failed.store(true, std::memory_order_relaxed);
      }
    }
  }
  if (failed.load()) throw std::bad_alloc();
}

// The rows of x as A takes them, padded with zeros to whole steps.
template <class T, class A>
Floats arrange(const Product& p, int64_t steps) {
  const int64_t rows = p.slots / p.top;
  Floats out = allocate(rows * steps * W * A::kVectors);
  float* const base = out.get();
  parallel(rows, rows * p.k < kSerial ? 1 : p.threads, [&p, base, steps](int64_t row) {
    const T* const from = static_cast<const T*>(p.x) + row * p.x_row;
    float* const to = base + row * steps * W * A::kVectors;
    for (int64_t step = 0; step < steps; ++step)
      A::arranged(from + step * kStep, std::min(kStep, p.k - step * kStep), to + step * W * A::kVectors);
  });
  return out;
}

// The part of the product that belongs to one expert and at most kTaskRows rows of its weight.
template <class T, class A>
class Task {
 public:
  Task(const Product& p, const Routing& routing, const float* x, int64_t steps)
      : p_(p), routing_(routing), x_(x), steps_(steps), length_(steps * W * A::kVectors) {}
  Task(const Task& other) : Task(other.p_, other.routing_, other.x_, other.steps_) {}

  void operator()(int64_t index) {
    const int64_t parts = (p_.n + kTaskRows - 1) / kTaskRows, hit = index / parts;
    first_row_ = index % parts * kTaskRows;
    end_row_ = std::min(first_row_ + kTaskRows, p_.n);
    expert_ = routing_.experts[hit];
    const int64_t* const slots = &routing_.slots[routing_.begin[hit]];
    const int64_t count = routing_.begin[hit + 1] - routing_.begin[hit];
    if (count <= kFewTokens) return tile<true>(slots, count);
    decode_rows();
    // Tiles of nearly equal height.
    const int64_t tiles = (count + kTokens - 1) / kTokens;
    for (int64_t i = 0; i < tiles; ++i)
      tile<false>(slots + i * count / tiles, (i + 1) * count / tiles - i * count / tiles);
  }

 private:
  PackedRow packed(int64_t row) const {
    return {p_.codes + expert_ * p_.codes_expert + row * p_.codes_row,
            p_.scales + expert_ * p_.scales_expert + row * p_.scales_row};
  }

  void decode_rows() {
    if (!decoded_) decoded_ = allocate(kTaskRows * length_);
    float* to = decoded_.get();
    for (int64_t row = first_row_; row < end_row_; ++row) {
      const PackedRow from = packed(row);
      V w[A::kVectors];
      for (int64_t step = 0; step < steps_; ++step) {
        from.at<A>(step, p_.k, w);
        for (V v : w) {
          store(to, v);
          to += W;
        }
      }
    }
  }

  // M = count slots by all rows of the task, which are decoded on the way, or were before.
  template <bool kPacked, int M = kPacked ? kFewTokens : kTokens>
  void tile(const int64_t* slots, int64_t count) {
    if constexpr (M > 1)
      if (count < M) return tile<kPacked, M - 1>(slots, count);
    const float* x[M];
    for (int m = 0; m < M; ++m) x[m] = x_ + slots[m] / p_.top * length_;
    for (int64_t row = first_row_; row < end_row_; row += kRows) {
      V sums[M][kRows];
      for (auto& of_slot : sums)
        for (V& v : of_slot) v = zero();
      if constexpr (kPacked) add_packed<M>(row, x, sums);
      else add_decoded<M>(row, x, sums);
      for (int m = 0; m < M; ++m) finish(slots[m], row, sums[m]);
    }
  }

  // Past the last row a tile repeats it, and nobody looks at the result.
  int64_t clamped(int64_t row) const { return std::min(row, end_row_ - 1); }

  template <int M>
  void add_packed(int64_t row, const float* const (&x)[M], V (&sums)[M][kRows]) const {
    PackedRow rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = packed(clamped(row + r));
    for (int64_t step = 0; step < steps_; ++step)
      for (int r = 0; r < kRows; ++r) {
        V w[A::kVectors];
        rows[r].at<A>(step, p_.k, w);
        for (int v = 0; v < A::kVectors; ++v)
          for (int m = 0; m < M; ++m)
            sums[m][r] = A::add_product(w[v], load(x[m] + (step * A::kVectors + v) * W), sums[m][r]);
      }
  }

  template <int M>
  void add_decoded(int64_t row, const float* const (&x)[M], V (&sums)[M][kRows]) const {
    const float* w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = decoded_.get() + (clamped(row + r) - first_row_) * length_;
    for (int64_t i = 0; i < length_; i += W) {
      V of_slot[M];
      for (int m = 0; m < M; ++m) of_slot[m] = load(x[m] + i);
      for (int r = 0; r < kRows; ++r) {
        const V of_row = load(w[r] + i);
        for (int m = 0; m < M; ++m) sums[m][r] = A::add_product(of_row, of_slot[m], sums[m][r]);
      }
    }
  }

  void finish(int64_t slot, int64_t first, const V (&sums)[kRows]) const {
    float sum[kRows];
    totals(sums, sum);
    const float of_expert = p_.expert_scale ? p_.expert_scale[expert_ * p_.expert_scale_expert] : 1.f;
    T* const y = static_cast<T*>(p_.y) + slot * p_.n;
    for (int64_t row = first; row < std::min(first + kRows, end_row_); ++row) {
      const float of_row = p_.row_scale[expert_ * p_.row_scale_expert + row * p_.row_scale_row];
      y[row] = static_cast<T>(sum[row - first] * (of_row * of_expert));
      if (p_.bias)
        y[row] = static_cast<T>(static_cast<float>(y[row]) + p_.bias[expert_ * p_.bias_expert + row * p_.bias_row]);
    }
  }

  const Product& p_;
  const Routing& routing_;
  const float* x_;
  int64_t steps_, length_;  // of a row: steps, and 32-bit lanes as A arranges them
  int64_t expert_ = 0, first_row_ = 0, end_row_ = 0;
  Floats decoded_;
};

template <class T>
void product(const Product& p) {
  using A = Arithmetic<T>;
  const Routing routing(p);
  if (static_cast<int64_t>(routing.slots.size()) < p.slots)
    for (int64_t s = 0; s < p.slots; ++s)
      if (!Routing::inside(p, s)) std::fill_n(static_cast<T*>(p.y) + s * p.n, p.n, T(0.f));
  const int64_t steps = (p.k + kStep - 1) / kStep, parts = (p.n + kTaskRows - 1) / kTaskRows;
  const Floats x = arrange<T, A>(p, steps);
  parallel(static_cast<int64_t>(routing.experts.size()) * parts, p.threads, Task<T, A>(p, routing, x.get(), steps));
}

// Nearest e4m3 value of v >= 0, ties to even, at most 448; NaN stays.
inline float rounded_to_e4m3(float v) {
  v = v > 448.f ? 448.f : v;
  if (v < 0x1p-6f) return std::nearbyint(v * 0x1p9f) * 0x1p-9f;
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(v));
  if (v == v) bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFFu;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

// One block, step by step as Dialect in fx_nvfp4/dialects.py.
template <class T>
void round_block(const T* from, float scale, float inverse, T* to) {
  float x[kBlock], amax = 0.f;
  for (int i = 0; i < kBlock; ++i) x[i] = static_cast<float>(from[i]);
  for (float v : x) amax = std::fabs(v) > amax ? std::fabs(v) : amax;  // not NaN
  const float sixth = amax * (1.f / 6.f);
  const float block_scale = rounded_to_e4m3(sixth == 0.f ? 0.f : inverse * sixth);
  const float to_code = block_scale == 0.f ? 0.f : 1.f / (block_scale * scale);
  for (int i = 0; i < kBlock; ++i) {
    const float m = block_scale == 0.f ? 0.f : std::fabs(x[i] * to_code);
    float e2m1 = (m > .25f ? .5f : 0.f) + (m >= .75f ? .5f : 0.f) + (m > 1.25f ? .5f : 0.f) + (m >= 1.75f ? .5f : 0.f);
    e2m1 += (m > 2.5f ? 1.f : 0.f) + (m >= 3.5f ? 1.f : 0.f) + (m > 5.f ? 2.f : 0.f);
    to[i] = static_cast<T>((x[i] == x[i] && m == m ? std::copysign(e2m1, x[i]) : 6.f) * block_scale);
  }
}

template <class T>
void round_rows(const Rounding& r) {
  parallel(r.rows, r.rows * r.k < kSerial ? 1 : r.threads, [&r](int64_t row) {
    const int64_t group = r.group ? std::clamp<int64_t>(r.group[row], 0, r.groups - 1) : 0;
    for (int64_t k = 0; k < r.k; k += kBlock)
      round_block(static_cast<const T*>(r.x) + row * r.x_row + k, r.scale[group], r.inverse[group],
                  static_cast<T*>(r.out) + row * r.k + k);
  });
}

template <class T>
void combine(const Sum& s) {
  parallel(s.tokens, s.tokens * s.top * s.n < kSerial ? 1 : s.threads, [&s](int64_t t) {
    float sum[kSumColumns];
    for (int64_t first = 0; first < s.n; first += kSumColumns) {
      const int64_t count = std::min(kSumColumns, s.n - first);
      std::fill_n(sum, count, 0.f);
      for (int64_t slot = t * s.top; slot < (t + 1) * s.top; ++slot) {
        if (s.ids[slot] < 0 || s.ids[slot] >= s.experts) continue;
        const float weight = s.weights ? s.weights[slot] : 1.f;
        const T* const y = static_cast<const T*>(s.y) + slot * s.n + first;
        for (int64_t i = 0; i < count; ++i) sum[i] += static_cast<float>(y[i]) * weight;
      }
      for (int64_t i = 0; i < count; ++i) static_cast<T*>(s.out)[t * s.n + first + i] = static_cast<T>(sum[i]);
    }
  });
}

// Calls call(T{}) for the dtype of that number.
template <class Call>
void with_dtype(int64_t dtype, const Call& call) {
  if (dtype == 0) call(float{});
  else if (dtype == 1) call(c10::BFloat16{});
  else call(c10::Half{});
}

}  // namespace

extern "C" const char* fx_nvfp4_isa() { return kIsa; }

// 0, or 1 where memory does not suffice.
extern "C" int fx_nvfp4_product(const Product* p) {
  try {
    with_dtype(p->dtype, [p](auto t) { product<decltype(t)>(*p); });
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

extern "C" void fx_nvfp4_round(const Rounding* r) {
  with_dtype(r->dtype, [r](auto t) { round_rows<decltype(t)>(*r); });
}

extern "C" void fx_nvfp4_combine(const Sum* s) {
  with_dtype(s->dtype, [s](auto t) { combine<decltype(t)>(*s); });
}
