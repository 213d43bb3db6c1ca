// Products of bfloat16 rows with integer weights on processors with AVX-512 and AMX: native.py says what they compute.
// The caller checks types and sizes.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using at::Tensor;
using Half = uint16_t;  // the bits of a bfloat16

constexpr int64_t LANES = 16;    // float32 numbers in a vector
constexpr int64_t LINE = 64;     // bytes of the cache's unit
constexpr int64_t AHEAD = 8192;  // bytes: nearer or farther, or into the first cache, is slower
constexpr int64_t BLOCK = 64;    // columns that ATen's int4 format interleaves
constexpr int64_t HALF = BLOCK / 2;

float widened(Half half) {
  const uint32_t bits = uint32_t(half) << 16;
  float real;
  std::memcpy(&real, &bits, sizeof real);
  return real;
}

Half rounded(float real) {  // to nearest, ties to even; not for NaN
  uint32_t bits;
  std::memcpy(&bits, &real, sizeof bits);
  return Half((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

const Half* bits(const Tensor& t) { return static_cast<const Half*>(t.const_data_ptr()); }
Half* bits_to(Tensor& t) { return static_cast<Half*>(t.mutable_data_ptr()); }

__m128i bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
__m512 reals(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(p))); }

// to[r * apart]: row r of x (ROWS, width) times one row of codes, times its scale
template <int ROWS>
void dots(const float* x, const int8_t* w, int64_t width, float scale, Half* to, int64_t apart) {
  constexpr int64_t PARTS = LINE / LANES;
  __m512 sum[ROWS][PARTS];
  for (auto& row : sum)
    for (auto& part : row) part = _mm512_setzero_ps();
  auto add = [&](int64_t k, int64_t part) {
    const __m512 u = reals(w + k);
    for (int r = 0; r < ROWS; r++) sum[r][part] = _mm512_fmadd_ps(u, _mm512_loadu_ps(x + r * width + k), sum[r][part]);
  };
  int64_t k = 0;
  for (; k + LINE <= width; k += LINE) {
    _mm_prefetch(reinterpret_cast<const char*>(w + k + AHEAD), _MM_HINT_T1);
    for (int64_t part = 0; part < PARTS; part++) add(k + part * LANES, part);
  }
  for (; k < width; k += LANES) add(k, 0);
  for (int r = 0; r < ROWS; r++) {
    const __m512 all = _mm512_add_ps(_mm512_add_ps(sum[r][0], sum[r][1]), _mm512_add_ps(sum[r][2], sum[r][3]));
    to[r * apart] = rounded(_mm512_reduce_add_ps(all) * scale);
  }
}

Tensor int8_rows(const Tensor& x, const Tensor& codes, const Tensor& scale) {
  const int64_t rows = x.size(0), width = x.size(1), out = codes.size(0);
  const Tensor wide = x.to(at::kFloat);
  Tensor y = at::empty({rows, out}, x.options());
  const float* from = wide.const_data_ptr<float>();
  const int8_t* weight = codes.const_data_ptr<int8_t>();
  const Half* scales = bits(scale);
  Half* to = bits_to(y);
  at::parallel_for(0, out, LINE, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++)
      for (int64_t r = 0; r < rows; r += 4) {
        const int64_t count = std::min<int64_t>(4, rows - r);
        auto* some = count == 4 ? dots<4> : count == 3 ? dots<3> : count == 2 ? dots<2> : dots<1>;
        some(from + r * width, weight + n * width, width, widened(scales[n]), to + r * out + n, out);
      }
  });
  return y;
}

#if defined(TILES)

constexpr int64_t TILE = 16;     // rows, and columns, of a tile of sums
constexpr int64_t DEPTH = 32;    // products in a sum per step
constexpr int64_t PANEL = 32;    // rows, and columns, of the sums kept in registers: 2 x 2 tiles

// The layout of a thread's tile registers, given back at the end.
struct Registers {
  struct alignas(64) Layout {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Registers() {
    Layout layout;
    for (int i = 0; i < 8; i++) layout.bytes[i] = LINE, layout.rows[i] = TILE;
    _tile_loadconfig(&layout);
  }
  ~Registers() { _tile_release(); }
  Registers(const Registers&) = delete;
};

bool tiles_granted() {  // Linux hands out tile registers on request, to a process
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
  return granted;
}

// sums (16 A, 16 B) with rows of PANEL: a (16 A, width) times b (width, 16 B), whose rows lie in pairs:
// (width / 2, columns, 2); lda and ldb are numbers from one row, and one pair of rows, to the next
template <int A, int B>
void multiply(const Half* a, int64_t lda, const Half* b, int64_t ldb, float* sums, int64_t width) {
  _tile_zero(0);
  if constexpr (B > 1) _tile_zero(1);
  if constexpr (A > 1) _tile_zero(2);
  if constexpr (A > 1 && B > 1) _tile_zero(3);
  for (int64_t k = 0; k < width; k += DEPTH) {
    _tile_loadd(4, a + k, lda * 2);
    _tile_loadd(6, b + k / 2 * ldb, ldb * 2);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (B > 1) {
      _tile_loadd(7, b + k / 2 * ldb + 2 * TILE, ldb * 2);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (A > 1) {
      _tile_loadd(5, a + TILE * lda + k, lda * 2);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (A > 1 && B > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, PANEL * 4);
  if constexpr (B > 1) _tile_stored(1, sums + TILE, PANEL * 4);
  if constexpr (A > 1) _tile_stored(2, sums + TILE * PANEL, PANEL * 4);
  if constexpr (A > 1 && B > 1) _tile_stored(3, sums + TILE * PANEL + TILE, PANEL * 4);
}

int64_t whole_tiles(int64_t rows) { return (rows + TILE - 1) / TILE * TILE; }

// One group of a block: bytes (width, 32) of two codes each, and scales of 64 columns (every second number), to
// bfloat16 (width / 2, 64, 2)
void unpack4(const uint8_t* pairs, const Half* scale, Half* to, int64_t width) {
  constexpr int64_t VECTORS = BLOCK / LANES;
  alignas(64) float wide[BLOCK], level[LANES];
  alignas(64) Half order[2 * LANES];
  for (int64_t i = 0; i < BLOCK; i++) wide[i] = widened(scale[2 * i]);
  for (int i = 0; i < LANES; i++) level[i] = float(i - 8), order[2 * i] = i, order[2 * i + 1] = i + LANES;
  const __m512 levels = _mm512_load_ps(level);
  const __m512i by_turns = _mm512_load_si512(order);
  __m512 scales[VECTORS];
  for (int i = 0; i < VECTORS; i++) scales[i] = _mm512_load_ps(wide + LANES * i);
  for (int64_t k = 0; k < width; k += 2) {
    __m512i row[2][2];  // of k and k + 1, columns 0 to 31 in the low halves of the bytes
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++) row[i][j] = _mm512_cvtepu8_epi32(bytes(pairs + (k + i) * HALF + j * LANES));
    for (int v = 0; v < VECTORS; v++) {
      __m512 real[2];
      for (int i = 0; i < 2; i++) {
        const __m512i code = v < 2 ? row[i][v] : _mm512_srli_epi32(row[i][v - 2], 4);  // the table reads 4 bits of it
        real[i] = _mm512_mul_ps(_mm512_permutexvar_ps(code, levels), scales[v]);
      }
      const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(real[1], real[0]));
      _mm512_storeu_si512(to + k * BLOCK + v * 2 * LANES, _mm512_permutexvar_epi16(by_turns, both));
    }
  }
}

Tensor int4_tiles(const Tensor& x, const Tensor& packed, const Tensor& scale_zero) {
  TORCH_CHECK(tiles_granted(), "int4_tiles: the system grants no tile registers");
  const int64_t rows = x.size(0), width = x.size(1), out = packed.size(0), padded = whole_tiles(rows);
  const int64_t groups = scale_zero.size(0), group = width / groups;
  Tensor whole = x;
  if (padded != rows) {
    whole = at::empty({padded, width}, x.options());
    std::memcpy(bits_to(whole), bits(x), size_t(rows * width) * sizeof(Half));
    std::memset(bits_to(whole) + rows * width, 0, size_t((padded - rows) * width) * sizeof(Half));
  }
  Tensor y = at::empty({rows, out}, x.options());
  const Half *from = bits(whole), *scales = bits(scale_zero);
  const uint8_t* pairs = packed.const_data_ptr<uint8_t>();
  Half* to = bits_to(y);
  at::parallel_for(0, out / BLOCK, 1, [&](int64_t first, int64_t last) {
    Registers registers;
    std::vector<Half> block(size_t(width * BLOCK));
    alignas(64) float sums[PANEL * PANEL];
    for (int64_t b = first; b < last; b++) {
      for (int64_t g = 0; g < groups; g++) {
        const uint8_t* some = pairs + (b * width + g * group) * HALF;
        unpack4(some, scales + 2 * (g * out + b * BLOCK), block.data() + g * group * BLOCK, group);
      }
      for (int64_t m = 0; m < padded; m += PANEL)
        for (int64_t n = 0; n < BLOCK; n += PANEL) {
          auto* product = padded - m >= PANEL ? multiply<2, 2> : multiply<1, 2>;
          product(from + m * width, width, block.data() + 2 * n, 2 * BLOCK, sums, width);
          for (int64_t r = 0; r < std::min(PANEL, rows - m); r++)
            for (int64_t i = 0; i < PANEL; i += LANES) {
              const __m256bh half = _mm512_cvtneps_pbh(_mm512_load_ps(sums + PANEL * r + i));
              std::memcpy(to + (m + r) * out + b * BLOCK + n + i, &half, sizeof half);
            }
        }
    }
  });
  return y;
}

Tensor int8_tiles(const Tensor& x, const Tensor& codes, const Tensor& scale) {
  TORCH_CHECK(tiles_granted(), "int8_tiles: the system grants no tile registers");
  const int64_t rows = x.size(0), width = x.size(1), out = codes.size(0), padded = whole_tiles(rows);
  Tensor turned = at::empty({width / 2, padded, 2}, x.options()), y = at::empty({rows, out}, x.options());
  const uint32_t* pairs = static_cast<const uint32_t*>(x.const_data_ptr());
  uint32_t* columns = static_cast<uint32_t*>(turned.mutable_data_ptr());
  at::parallel_for(0, width / 2, LINE, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; k++)
      for (int64_t r = 0; r < padded; r++) columns[k * padded + r] = r < rows ? pairs[r * width / 2 + k] : 0;
  });
  const Half *b = bits(turned), *scales = bits(scale);
  const int8_t* weight = codes.const_data_ptr<int8_t>();
  Half* to = bits_to(y);
  at::parallel_for(0, (out + PANEL - 1) / PANEL, 1, [&](int64_t first, int64_t last) {
    Registers registers;
    std::vector<Half> block(size_t(PANEL * width));
    alignas(64) float sums[PANEL * PANEL], factors[PANEL] = {};
    alignas(64) int32_t places[LANES];
    for (int64_t i = 0; i < LANES; i++) places[i] = int32_t(PANEL * i);
    const __m512i rows_apart = _mm512_load_si512(places);
    for (int64_t n = first * PANEL; n < std::min(last * PANEL, out); n += PANEL) {
      const int64_t count = std::min(PANEL, out - n);
      for (int64_t i = 0; i < count; i++) factors[i] = widened(scales[n + i]);
      for (int64_t i = 0; i < count * width; i += 2 * LANES) {
        const int8_t* some = weight + n * width + i;
        const __m512bh both = _mm512_cvtne2ps_pbh(reals(some + LANES), reals(some));
        std::memcpy(block.data() + i, &both, sizeof both);
      }
      for (int64_t m = 0; m < padded; m += PANEL) {
        auto* product = padded - m >= PANEL ? multiply<2, 2> : multiply<2, 1>;
        product(block.data(), width, b + 2 * m, 2 * padded, sums, width);
        for (int64_t r = 0; r < std::min(PANEL, rows - m); r++)
          for (int64_t i = 0; i < count; i += LANES) {
            const __m512 column = _mm512_i32gather_ps(rows_apart, sums + PANEL * i + r, sizeof(float));
            const __m256bh half = _mm512_cvtneps_pbh(_mm512_mul_ps(column, _mm512_load_ps(factors + i)));
            std::memcpy(to + (m + r) * out + n + i, &half, size_t(std::min(LANES, count - i)) * sizeof(Half));
          }
      }
    }
  });
  return y;
}

#endif

}  // namespace

TORCH_LIBRARY(lightning_quant, library) {
  library.def("int8_rows(Tensor x, Tensor codes, Tensor scale) -> Tensor");
#if defined(TILES)
  library.def("int4_tiles(Tensor x, Tensor packed, Tensor scale_zero) -> Tensor");
  library.def("int8_tiles(Tensor x, Tensor codes, Tensor scale) -> Tensor");
#endif
}

TORCH_LIBRARY_IMPL(lightning_quant, CPU, library) {
  library.impl("int8_rows", &int8_rows);
#if defined(TILES)
  library.impl("int4_tiles", &int4_tiles);
  library.impl("int8_tiles", &int8_tiles);
#endif
}
