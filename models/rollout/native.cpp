// One token more for every thought, on a CPU: the whole stack of layers in one call. native.py says when and with what.
//
// At a few rows weights are multiplied hardly faster than they can be read. Every product here is therefore the same
// one: a few rows against panels, which hold the columns of a register side by side in the order in which they are
// read. Weights are packed so, and so are keys (a column is a key) and values (a column is a dimension, summed over
// keys). bf16 is multiplied in pairs and summed in fp32; what a tensor of the model would hold is rounded to bf16, so
// that the numbers are those of the layers run one by one.
//
// Letters: A anchors, R rows, each a thought, W width, H query heads, G key-value heads, J = H / G, D head size, K the
// rows of an anchor, which are neighbours and differ in number.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __FMA__
#include <immintrin.h>
#endif

namespace {

// Columns of a panel, as many as a register holds, and rows whose sums are held in registers. Vectors longer than a
// register are kept in memory, and everything takes eight times as long.
#if defined __AVX512F__
constexpr long LANES = 16, TILE = 16;
#elif defined __AVX__
constexpr long LANES = 8, TILE = 12;
#else
constexpr long LANES = 4, TILE = 12;
#endif
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class T>
inline T load(const void* from) {
  T to;
  memcpy(&to, from, sizeof to);
  return to;
}

struct bf16 {
  uint16_t raw;
};

inline float get(float x) { return x; }
inline float get(bf16 x) { return std::bit_cast<float>(uint32_t(x.raw) << 16); }
inline void set(float& to, float x) { to = x; }
inline void set(bf16& to, float x) {
  const uint32_t word = std::bit_cast<uint32_t>(x);
  to.raw = uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);  // to the nearest, ties to even
}
template <class T>
inline T rounded(float x) {
  T to;
  set(to, x);
  return to;
}

inline Floats get_all(const float* from) { return load<Floats>(from); }
inline Floats get_all(const bf16* from) {
  return std::bit_cast<Floats>(__builtin_convertvector(load<Halves>(from), Words) << 16);
}
template <class T>
inline void copy_all(T* to, const T* from) {
  memcpy(to, from, LANES * sizeof(T));
}
inline void set_all(float* to, Floats x) { memcpy(to, &x, sizeof x); }
inline void set_all(bf16* to, Floats x) {
  const Words words = std::bit_cast<Words>(x);
  const Halves halves = __builtin_convertvector((words + 0x7fff + ((words >> 16) & 1)) >> 16, Halves);
  memcpy(to, &halves, sizeof halves);
}

// e^x to 2e-7 of it; 0 below the smallest normal number.
inline Floats exponential(Floats x) {
  const Floats lowest = Floats{} - 87.3f;
  const Floats clamped = x > lowest ? (x < -lowest ? x : -lowest) : lowest;
  const Floats shift = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats whole = (clamped * 1.44269504f + shift) - shift;
  const Floats rest = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats sum = Floats{} + 1.98412698e-4f;
  for (float coefficient : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f})
    sum = sum * rest + coefficient;
  typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
  const Integers power = (__builtin_convertvector(whole, Integers) + 127) << 23;
  return x > lowest ? sum * std::bit_cast<Floats>(power) : Floats{};
}

// How many neighbours along the summed axis lie together in a panel, and the sum of their products.
template <class T>
constexpr long STEP = sizeof(float) / sizeof(T);

inline Floats plus_product(Floats sum, Floats column, float x) {
  // In one operation by name, since compilers take one or two depending on what stands around it, and then a row's
  // numbers would depend on how many there are.
#if defined __AVX512F__
  return (Floats)_mm512_fmadd_ps((__m512)column, _mm512_set1_ps(x), (__m512)sum);
#elif defined __FMA__
  return (Floats)_mm256_fmadd_ps((__m256)column, _mm256_set1_ps(x), (__m256)sum);
#else
  return sum + column * x;
#endif
}
inline Floats plus_products(Floats sum, const float* x, Floats column) { return plus_product(sum, column, *x); }
inline Floats plus_products(Floats sum, const bf16* x, Floats columns) {
#ifdef __AVX512BF16__
  const __m512bh pairs = std::bit_cast<__m512bh>(columns), x_pair = (__m512bh)_mm512_set1_epi32(load<int32_t>(x));
  return std::bit_cast<Floats>(_mm512_dpbf16_ps(std::bit_cast<__m512>(sum), pairs, x_pair));
#else
  const Words pairs = std::bit_cast<Words>(columns);
  sum = plus_product(sum, std::bit_cast<Floats>(pairs << 16), get(x[0]));
  return plus_product(sum, std::bit_cast<Floats>(pairs & 0xffff0000u), get(x[1]));
#endif
}

// Processors wait for memory unless they are told what is multiplied next: what lies so many bytes ahead, where everything
// is read from one end to the other.
constexpr long AHEAD = 8192;
// Elements of a row that lie together in a tile. Rows are multiplied in tiles, [length / CHUNK][TILE][CHUNK], because the
// elements that are read one after the other then lie close to each other.
template <class T>
constexpr long CHUNK = LANES * STEP<T>;

template <class T>
inline long whole_chunks(long size) {
  return (size + CHUNK<T> - 1) / CHUNK<T> * CHUNK<T>;
}

// Where element i of row r is in tiles of rows of that size.
template <class T>
inline long in_tiles(long r, long i, long size) {
  return r / TILE * TILE * whole_chunks<T>(size) + (i / CHUNK<T> * TILE + r % TILE) * CHUNK<T> + i % CHUNK<T>;
}

// sums[p][r][LANES] = x[r][:] · panel p[:][LANES] for ROWS rows of a tile. `distance`: elements from one panel to the next,
// `stride`: from one step along the summed axis to the next. `ahead`: bytes from what is multiplied to what is fetched.
template <class T, int PANELS, int ROWS>
inline void multiply(const T* x, const T* panel, long distance, long stride, long length, long ahead, Floats* sums) {
  Floats held[PANELS][ROWS] = {};
  for (long from = 0; from < length; from += CHUNK<T>, x += TILE * CHUNK<T>)
    for (long i = 0; i < std::min(CHUNK<T>, length - from); i += STEP<T>, panel += stride) {
      Floats columns[PANELS];
      for (int p = 0; p < PANELS; p++) {
        __builtin_prefetch(reinterpret_cast<const char*>(panel + p * distance) + ahead);
        columns[p] = load<Floats>(panel + p * distance);
      }
      for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) held[p][r] = plus_products(held[p][r], x + r * CHUNK<T> + i, columns[p]);
    }
  for (int p = 0; p < PANELS; p++)
    for (int r = 0; r < ROWS; r++) sums[p * TILE + r] = held[p][r];
}

template <class T, int PANELS = 1, int ROWS = TILE / PANELS>
[[gnu::noinline]] void multiply(long rows, const T* tile, const T* panel, long distance, long stride, long length,
                                long ahead, Floats* sums) {
  if (rows == ROWS) return multiply<T, PANELS, ROWS>(tile, panel, distance, stride, length, ahead, sums);
  if constexpr (ROWS > 1) multiply<T, PANELS, ROWS - 1>(rows, tile, panel, distance, stride, length, ahead, sums);
}

// The same for `count` panels, of each of which `use` is told the number and the sums. One row after the other would wait
// for its own sums: a few of them are multiplied with several panels at a time.
template <class T, class Use>
inline void multiply_each(long count, long rows, const T* tile, const T* panel, long distance, long stride, long length,
                          long ahead, Use&& use) {
  constexpr long WIDE = 4;
  Floats sums[WIDE * TILE];
  for (long p = 0; p < count;) {
    const long few = rows <= TILE / WIDE && p + WIDE <= count ? WIDE : 1;
    const T* here = panel + p * distance;
    few == 1 ? multiply<T>(rows, tile, here, distance, stride, length, ahead, sums)
             : multiply<T, WIDE>(rows, tile, here, distance, stride, length, ahead, sums);
    for (long i = 0; i < few; i++) use(p + i, sums + i * TILE);
    p += few;
  }
}

}  // namespace

// What native.py fills in, in the same order.

struct Shape {
  int64_t layers, width, ffn_width, heads, kv_heads, head_dim;
  int64_t anchors;  // A
  int64_t text_capacity, own_capacity;  // tokens that the packed keys of a text and of a thought can hold; LANES divides both
  int64_t low_precision;  // activations, weights, keys and values in bf16, not fp32
  int64_t post_norm, norms_all_heads;  // see DecoderConfig
  float epsilon;
};

// Weights are packed, [N / LANES][in / STEP][LANES][STEP] for N outputs; norms and biases are fp32, null where there is none.
// Keys are packed [sequence][G][tokens / LANES][D / STEP][LANES][STEP], values [sequence][G][tokens / STEP][D][STEP], where a
// sequence is a row of text, or the thought that holds a seat.
struct Layer {
  const float *attention_norm, *mlp_norm, *query_norm, *key_norm;
  const void *query_key_value, *out, *gate_up, *down;  // panels of gate and up alternate
  const float *query_key_value_bias, *out_bias, *gate_up_bias, *down_bias;
  const void *text_keys, *text_values;
  void *own_keys, *own_values;
  const void *cos, *sin;  // [position][D], null without rotary embedding
};

// Keys first to last (exclusive) of a row of text, which an anchor sees.
struct Span {
  int32_t anchor, row, first, last;
};

namespace {

template <class T>
float inverse_norm(const T* x, long size, float epsilon) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (long i = 0; i < size; i++) squares += get(x[i]) * get(x[i]);
  return 1 / std::sqrt(squares / size + epsilon);
}

template <class T>
void normed(const T* x, const float* weight, long size, float epsilon, T* out) {
  const float inverse = inverse_norm(x, size, epsilon);
  for (long i = 0; i < size; i++) set(out[i], get(x[i]) * inverse * weight[i]);
}

// Turns x in place, whose halves are pairs; see rope.cos_and_sin.
template <class T>
void rotate(T* x, const T* cos, const T* sin, long size) {
  const long half = size / 2;
  for (long i = 0; i < half; i++) {
    const float a = get(x[i]), b = get(x[half + i]);
    const float a_cos = get(rounded<T>(a * get(cos[i]))), b_cos = get(rounded<T>(b * get(cos[half + i])));
    set(x[i], a_cos + b * get(sin[i]));
    set(x[half + i], b_cos + a * get(sin[half + i]));
  }
}

// Attention of at most TILE query rows q [rows][D] over keys first to last of a packed sequence: out [rows][D], not yet
// divided by `sum`, the sum of the exponentials of the scores less `highest`. next: the keys that are read after these.
template <class T>
void attend(long rows, const T* q, long D, const T* keys, const T* values, long first, long last, const T* next,
            std::vector<float>& scores, std::vector<T>& shares, std::vector<T>& tile, float* out, float* highest,
            float* sum) {
  const long from = first / LANES * LANES, width = (last + LANES - 1) / LANES * LANES - from;
  const float scale = 1 / std::sqrt(float(D));
  scores.resize(std::max(long(scores.size()), TILE * width));
  shares.resize(std::max(long(shares.size()), TILE * whole_chunks<T>(width)));
  tile.resize(TILE * whole_chunks<T>(D));
  for (long r = 0; r < rows; r++)
    for (long d = 0; d < D; d += LANES) copy_all(&tile[in_tiles<T>(r, d, D)], q + r * D + d);
  // Keys and values are as many: those of the one are fetched while the others are multiplied.
  const auto bytes = [](const T* to, const T* here) { return long(uintptr_t(to) - uintptr_t(here)); };
  keys += from * D, values += from * D;
  multiply_each<T>(width / LANES, rows, tile.data(), keys, LANES * D, CHUNK<T>, D, bytes(values, keys),
                   [&](long n, const Floats* sums) {
                     for (long r = 0; r < rows; r++) set_all(&scores[r * width + n * LANES], sums[r] * scale);
                   });
  for (long r = 0; r < rows; r++) {
    float* score = &scores[r * width];
    std::fill(score, score + (first - from), LOWEST);
    std::fill(score + (last - from), score + width, LOWEST);
    Floats tops = Floats{} + LOWEST, total = {};
    for (long n = 0; n < width; n += LANES) {
      const Floats here = load<Floats>(score + n);
      tops = here > tops ? here : tops;
    }
    float top = LOWEST;
    for (long i = 0; i < LANES; i++) top = std::max(top, tops[i]);
    for (long n = 0; n < width; n += LANES) {
      const Floats share = exponential(load<Floats>(score + n) - top);
      total += share;
      set_all(&shares[in_tiles<T>(r, n, width)], share);
    }
    highest[r] = top;
    sum[r] = 0;
    for (long i = 0; i < LANES; i++) sum[r] += total[i];
  }
  multiply_each<T>(D / LANES, rows, shares.data(), values, CHUNK<T>, D * STEP<T>, width, bytes(next, values),
                   [&](long d, const Floats* sums) {
                     for (long r = 0; r < rows; r++) set_all(out + r * D + d * LANES, sums[r]);
                   });
}

// x [R, W] the newest tokens' embeddings, and afterwards their last layer's output. positions: [A], of each anchor.
// seats: [R], where each row's keys and values are; lengths: [R], how many tokens are there before, one more after.
// rows_of, spans_of: [A + 1], the first of each anchor's rows and spans.
template <class T>
void step(const Shape& s, const Layer* layers, const Span* spans, const int64_t* spans_of, const int64_t* positions,
          const int64_t* rows_of, const int64_t* seats, const int64_t* lengths, T* x, int threads) {
  const long W = s.width, F = s.ffn_width, H = s.heads, G = s.kv_heads, D = s.head_dim, J = H / G;
  const long R = rows_of[s.anchors], all_heads = H + 2 * G, span_count = spans_of[s.anchors];
  std::vector<long> anchor_of(R), part_of(span_count + 1);  // the first of each span's results, of H K each
  for (long a = 0; a < s.anchors; a++) {
    std::fill(anchor_of.begin() + rows_of[a], anchor_of.begin() + rows_of[a + 1], a);
    for (long i = spans_of[a]; i < spans_of[a + 1]; i++) part_of[i + 1] = part_of[i] + H * (rows_of[a + 1] - rows_of[a]);
  }
  std::vector<T> normed_product(s.post_norm * R * W), projected(R * all_heads * D), query(R * H * D);
  // Rows of products, in tiles.
  const long whole_tiles = (R + TILE - 1) / TILE * TILE;
  std::vector<T> input(whole_tiles * whole_chunks<T>(W)), attended(whole_tiles * whole_chunks<T>(H * D)),
      gated(whole_tiles * whole_chunks<T>(F));
  std::vector<float> inverse(R);  // of the root mean square of each row of x
  std::vector<float> part(part_of.back() * D), part_highest(part_of.back()), part_sum(part_of.back());
  // Of what is laid out [A][G][K][J]: query head 0 of group g of a row.
  auto by_group = [&](long r, long g) {
    const long first = rows_of[anchor_of[r]], K = rows_of[anchor_of[r] + 1] - first;
    return first * H + (g * K + r - first) * J;
  };

#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scores;
    std::vector<T> shares, tile;
    std::vector<float> out(TILE * D);
    Floats sums[TILE], more[TILE];
    const Floats none = {};

    // The rows of x, normed where there is a weight.
    auto take_in = [&](const float* weight) {
#pragma omp for schedule(static)
      for (long r = 0; r < R; r++)
        if (weight) inverse[r] = inverse_norm(x + r * W, W, s.epsilon);
#pragma omp for schedule(static)
      for (long n = 0; n < W; n += LANES)
        for (long r = 0; r < R; r++) {
          T *to = &input[in_tiles<T>(r, n, W)], *from = x + r * W + n;
          weight ? set_all(to, get_all(from) * inverse[r] * load<Floats>(weight + n)) : copy_all(to, from);
        }
    };

    // The rows of x + rows · weight, in place; with post-norm of x + the norm of rows · weight.
    auto add_product = [&](const T* rows, long inner, const void* weight, const float* bias, const float* norm_weight) {
#pragma omp for schedule(static)
      for (long n = 0; n < W; n += LANES)
        for (long r = 0; r < R; r += TILE) {
          const long few = std::min(TILE, R - r);
          const T* panel = static_cast<const T*>(weight) + n * inner;
          multiply<T>(few, rows + in_tiles<T>(r, 0, inner), panel, 0, CHUNK<T>, inner, AHEAD, sums);
          for (long i = 0; i < few; i++) {
            T* here = x + (r + i) * W + n;
            T product[LANES];
            set_all(product, sums[i] + (bias ? load<Floats>(bias + n) : none));
            if (s.post_norm)
              memcpy(&normed_product[(r + i) * W + n], product, sizeof product);
            else
              set_all(here, get_all(here) + get_all(product));
          }
        }
      if (!s.post_norm) return;
#pragma omp for schedule(static)
      for (long r = 0; r < R; r++) {
        T *row = &normed_product[r * W], *here = x + r * W;
        normed(row, norm_weight, W, s.epsilon, row);
        for (long n = 0; n < W; n += LANES) set_all(here + n, get_all(here + n) + get_all(row + n));
      }
    };
    for (long l = 0; l < s.layers; l++) {
      const Layer& layer = layers[l];
      take_in(s.post_norm ? nullptr : layer.attention_norm);

#pragma omp for schedule(static)
      for (long n = 0; n < all_heads * D; n += LANES)
        for (long r = 0; r < R; r += TILE) {
          const long few = std::min(TILE, R - r);
          const T* panel = static_cast<const T*>(layer.query_key_value) + n * W;
          multiply<T>(few, &input[in_tiles<T>(r, 0, W)], panel, 0, CHUNK<T>, W, AHEAD, sums);
          const Floats bias = layer.query_key_value_bias ? load<Floats>(layer.query_key_value_bias + n) : none;
          for (long i = 0; i < few; i++) set_all(&projected[(r + i) * all_heads * D + n], sums[i] + bias);
        }

      if (s.norms_all_heads) {
#pragma omp for schedule(static)
        for (long r = 0; r < R; r++) {
          T *q = &projected[r * all_heads * D], *k = q + H * D;
          normed(q, layer.query_norm, H * D, s.epsilon, q);
          normed(k, layer.key_norm, G * D, s.epsilon, k);
        }
      }

      // Queries are laid out [A][G][K][J][D], so that all that see the same keys of a text are neighbours.
#pragma omp for schedule(static) collapse(2)
      for (long r = 0; r < R; r++)
        for (long h = 0; h < all_heads; h++) {
          T* from = &projected[(r * all_heads + h) * D];
          const long g = h < H ? h / J : (h - H) % G;
          const float* weight = h < H ? layer.query_norm : layer.key_norm;
          if (h < H + G && weight && !s.norms_all_heads) normed(from, weight, D, s.epsilon, from);
          if (h < H + G && layer.cos) {
            const long turn = (positions[anchor_of[r]] + lengths[r] + 1) * D;
            rotate(from, static_cast<const T*>(layer.cos) + turn, static_cast<const T*>(layer.sin) + turn, D);
          }
          if (h < H) {
            std::copy(from, from + D, &query[(by_group(r, g) + h % J) * D]);
          } else if (h < H + G) {
            const long length = lengths[r], place = (seats[r] * G + g) * s.own_capacity * D;
            T* to = static_cast<T*>(layer.own_keys) + place + length / LANES * LANES * D;
            for (long d = 0; d < D; d++)
              to[d / STEP<T> * LANES * STEP<T> + length % LANES * STEP<T> + d % STEP<T>] = from[d];
          } else {
            const long length = lengths[r], place = (seats[r] * G + g) * s.own_capacity * D;
            T* to = static_cast<T*>(layer.own_values) + place + length / STEP<T> * STEP<T> * D;
            for (long d = 0; d < D; d++) to[d * STEP<T> + length % STEP<T>] = from[d];
          }
        }

      // A thread takes every so many-th, so that it knows the next.
      const T *text_keys = static_cast<const T*>(layer.text_keys), *text_values = static_cast<const T*>(layer.text_values);
      const auto text_place = [&](long n) { return (spans[n / G].row * G + n % G) * s.text_capacity * D; };
#pragma omp for schedule(static, 1)
      for (long n = 0; n < span_count * G; n++) {
        const Span& span = spans[n / G];
        const long first = rows_of[span.anchor], queries = (rows_of[span.anchor + 1] - first) * J, g = n % G;
        const T *keys = text_keys + text_place(n), *values = text_values + text_place(n);
        const long after = std::min(n + threads, span_count * G - 1);
        const T* next = text_keys + text_place(after) + spans[after / G].first / LANES * LANES * D;
        for (long r = 0; r < queries; r += TILE) {
          const long to = part_of[n / G] + g * queries + r;
          attend<T>(std::min(TILE, queries - r), &query[(first * H + g * queries + r) * D], D, keys, values, span.first,
                    span.last, next, scores, shares, tile, &part[to * D], &part_highest[to], &part_sum[to]);
        }
      }

      // A thought's own tokens, and what was found in the text, merged.
      const T *own_keys = static_cast<const T*>(layer.own_keys), *own_values = static_cast<const T*>(layer.own_values);
      const auto own_place = [&](long n) { return (seats[n / G] * G + n % G) * s.own_capacity * D; };
#pragma omp for schedule(static, 1)
      for (long n = 0; n < R * G; n++) {
        const long r = n / G, g = n % G, a = anchor_of[r], from_query = by_group(r, g);
        const T *keys = own_keys + own_place(n), *values = own_values + own_place(n);
        const T* next = own_keys + own_place(std::min(n + threads, R * G - 1));
        for (long j = 0; j < J; j += TILE) {
          float highest[TILE], sum[TILE];
          const long few = std::min(TILE, J - j);
          attend<T>(few, &query[(from_query + j) * D], D, keys, values, 0, lengths[r] + 1, next, scores, shares, tile,
                    out.data(), highest, sum);
          for (long i = 0; i < few; i++) {
            const long here = from_query - rows_of[a] * H + j + i;
            float top = highest[i];
            for (long p = spans_of[a]; p < spans_of[a + 1]; p++) top = std::max(top, part_highest[part_of[p] + here]);
            float weight = std::exp(highest[i] - top), total = sum[i] * weight;
            for (long d = 0; d < D; d++) out[i * D + d] *= weight;
            for (long p = spans_of[a]; p < spans_of[a + 1]; p++) {
              const long from = part_of[p] + here;
              weight = std::exp(part_highest[from] - top);
              total += part_sum[from] * weight;
              for (long d = 0; d < D; d++) out[i * D + d] += weight * part[from * D + d];
            }
            for (long d = 0; d < D; d += LANES)
              set_all(&attended[in_tiles<T>(r, (g * J + j + i) * D + d, H * D)], load<Floats>(&out[i * D + d]) / total);
          }
        }
      }

      add_product(attended.data(), H * D, layer.out, layer.out_bias, layer.attention_norm);
      take_in(s.post_norm ? nullptr : layer.mlp_norm);

#pragma omp for schedule(static)
      for (long n = 0; n < F; n += LANES)
        for (long r = 0; r < R; r += TILE) {
          const long few = std::min(TILE, R - r);
          const T* panel = static_cast<const T*>(layer.gate_up) + 2 * n * W;
          multiply<T>(few, &input[in_tiles<T>(r, 0, W)], panel, 0, CHUNK<T>, W, AHEAD, sums);
          multiply<T>(few, &input[in_tiles<T>(r, 0, W)], panel + LANES * W, 0, CHUNK<T>, W, AHEAD, more);
          const float* bias = layer.gate_up_bias ? layer.gate_up_bias + 2 * n : nullptr;
          for (long i = 0; i < few; i++) {
            T gate[LANES], up[LANES];
            set_all(gate, sums[i] + (bias ? load<Floats>(bias) : none));
            set_all(up, more[i] + (bias ? load<Floats>(bias + LANES) : none));
            set_all(gate, get_all(gate) / (exponential(-get_all(gate)) + 1));
            set_all(&gated[in_tiles<T>(r + i, n, F)], get_all(gate) * get_all(up));
          }
        }

      add_product(gated.data(), F, layer.down, layer.down_bias, layer.mlp_norm);
    }
  }
}

// Rows that are drawn at a time, since their logits are held.
constexpr long DRAWN = 2 * TILE;
// Tokens whose masses are summed before they are cumulated.
constexpr long BLOCK = 256;

// One token for each of at most DRAWN rows, by inverting its distribution function at that row's uniform, as sample_tokens
// has it. hidden [R, W]; head: panels of whole blocks of columns; banned: 0, or -inf, of each column.
template <class T>
void draw(long R, long W, long columns, const T* hidden, const T* head, const float* banned, float temperature,
          const float* uniforms, float* logits, int64_t* tokens, float* logprobs, int threads) {
  const long blocks = columns / BLOCK;
  std::vector<T> input((R + TILE - 1) / TILE * TILE * whole_chunks<T>(W));
  std::vector<float> top(R * blocks), highest(R), mass(R * blocks), wrong(R * blocks);

#pragma omp parallel num_threads(threads)
  {
    Floats sums[TILE];
#pragma omp for schedule(static)
    for (long n = 0; n < W; n += LANES)
      for (long r = 0; r < R; r++) copy_all(&input[in_tiles<T>(r, n, W)], hidden + r * W + n);

#pragma omp for schedule(static)
    for (long b = 0; b < blocks; b++)
      for (long r = 0; r < R; r += TILE) {
        const long few = std::min(TILE, R - r);
        Floats tops[TILE], not_finite[TILE] = {};
        std::fill(tops, tops + TILE, Floats{} + LOWEST);
        for (long n = b * BLOCK; n < (b + 1) * BLOCK; n += LANES) {
          multiply<T>(few, &input[in_tiles<T>(r, 0, W)], head + n * W, 0, CHUNK<T>, W, AHEAD, sums);
          for (long i = 0; i < few; i++) {
            not_finite[i] += sums[i] - sums[i];
            const Floats logit = sums[i] / temperature + load<Floats>(banned + n);
            tops[i] = logit > tops[i] ? logit : tops[i];
            set_all(logits + (r + i) * columns + n, logit);
          }
        }
        for (long i = 0; i < few; i++) {
          float& here = top[(r + i) * blocks + b] = LOWEST;
          for (long lane = 0; lane < LANES; lane++) {
            here = std::max(here, tops[i][lane]);
            wrong[(r + i) * blocks + b] += not_finite[i][lane];
          }
        }
      }

#pragma omp for schedule(static)
    for (long r = 0; r < R; r++) highest[r] = *std::max_element(&top[r * blocks], &top[(r + 1) * blocks]);

#pragma omp for schedule(static) collapse(2)
    for (long r = 0; r < R; r++)
      for (long b = 0; b < blocks; b++) {
        float* here = logits + r * columns + b * BLOCK;
        Floats total = {};
        for (long n = 0; n < BLOCK; n += LANES) {
          const Floats masses = exponential(load<Floats>(here + n) - highest[r]);
          total += masses;
          set_all(here + n, masses);
        }
        for (long lane = 0; lane < LANES; lane++) mass[r * blocks + b] += total[lane];
      }

#pragma omp for schedule(static)
    for (long r = 0; r < R; r++) {
      double sum = 0, before = 0;
      float not_finite = 0;
      for (long b = 0; b < blocks; b++) sum += mass[r * blocks + b], not_finite += wrong[r * blocks + b];
      const double threshold = uniforms[r] * sum;
      long token = -1;
      for (long b = 0; b < blocks && token < 0; b++) {
        const double after = before + mass[r * blocks + b];
        const float* masses = logits + r * columns + b * BLOCK;
        for (long n = 0; after > threshold && n < BLOCK && token < 0; n++) {
          before += masses[n];
          if (before > threshold) token = b * BLOCK + n;
        }
        before = after;
      }
      // Rounding may leave the threshold above all: then the last token with a mass.
      for (long n = columns - 1; token < 0 && n > 0; n--)
        if (logits[r * columns + n] > 0) token = n;
      tokens[r] = not_finite == 0 ? std::max(token, 0L) : 0;
      logprobs[r] = not_finite == 0 ? std::log(logits[r * columns + tokens[r]] / sum) : not_finite;
    }
  }
}

}  // namespace

extern "C" void forethought_step(const Shape* shape, const Layer* layers, const Span* spans, const int64_t* spans_of,
                                 const int64_t* positions, const int64_t* rows_of, const int64_t* seats,
                                 const int64_t* lengths, void* x, int32_t threads) {
  auto run = [&](auto kind) {
    using T = decltype(kind);
    step<T>(*shape, layers, spans, spans_of, positions, rows_of, seats, lengths, static_cast<T*>(x), threads);
  };
  shape->low_precision ? run(bf16{}) : run(float{});
}

// `columns` rows of so many 4-byte words each, one fp32 or two bf16, as panels [columns / LANES][words][LANES], from the
// beginning of one to that of the next `distance` words.
extern "C" void forethought_pack(const uint32_t* x, int64_t columns, int64_t words, uint32_t* panels, int64_t distance,
                                 int32_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t n = 0; n < columns; n += LANES)
    for (int64_t w = 0; w < words; w++)
      for (int64_t lane = 0; lane < LANES; lane++)
        panels[n / LANES * distance + w * LANES + lane] = x[(n + lane) * words + w];
}

extern "C" int64_t forethought_lanes() { return LANES; }

// logits: room for `drawn` rows of so many columns, whole blocks of them. banned: 0 or -inf.
extern "C" void forethought_draw(int64_t rows, int64_t width, int64_t columns, int64_t low_precision,
                                 const void* hidden, const void* head, const float* banned, float temperature,
                                 const float* uniforms, float* logits, int64_t* tokens, float* logprobs,
                                 int32_t threads) {
  auto run = [&](auto kind) {
    using T = decltype(kind);
    for (int64_t r = 0; r < rows; r += DRAWN)
      draw<T>(std::min(DRAWN, long(rows - r)), width, columns, static_cast<const T*>(hidden) + r * width,
              static_cast<const T*>(head), banned, temperature, uniforms + r, logits, tokens + r, logprobs + r, threads);
  };
  low_precision ? run(bf16{}) : run(float{});
}

extern "C" int64_t forethought_block() { return BLOCK; }
extern "C" int64_t forethought_drawn() { return DRAWN; }
