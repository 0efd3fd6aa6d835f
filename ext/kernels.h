// What a kernel file provides: plain function pointers over raw memory, the only things that cross from one ISA to
// another.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kjax {

// How the checkpoint stores a projection. The order is that of the tables below, of kFormatInfo and of every Gemm.
//   fp8_block    e4m3, one fp32 scale per block of 128 x 128 weights (DeepSeek-V3's weight_scale_inv)
//   fp8_channel  e4m3, one fp32 scale per stored row
//   int4_group32   compressed-tensors: weights + 8, eight per int32, the first lowest, one bf16 scale per 32 of a row
//   int8_group128  int8, one bf16 scale per 128 of a row
// A quantised weight is bf16(scale * code), as in a checkpoint dequantised to bf16; it is scale * code in fp32 kernels
// (gemm_f32.h) and where the scales multiply sums of codes (lanes_along.h, float_rows.h, fp8_channel in
// gemm_avx512bf16.cpp), and few operand rows across those of fp8_channel are multiplied by the scales themselves.
enum class Format : int { kBf16, kFp32, kFp8Block, kFp8Channel, kInt4Group32, kInt8Group128 };
constexpr int kFormats = 6;

// Type of operands and stored activations: a fp32 store multiplies in fp32, every other one rounds operands to bf16.
enum class Dtype : int { kBf16, kFp32 };
constexpr Dtype kOperandType[kFormats] = {Dtype::kBf16, Dtype::kFp32, Dtype::kBf16,
                                          Dtype::kBf16, Dtype::kBf16, Dtype::kBf16};
constexpr int kBits[kFormats] = {16, 32, 8, 8, 4, 8};  // per stored weight, scales aside

// The block of weights that shares a scale, and the scale's size; no bytes: no scales. Scales lie row-major by blocks,
// partial blocks at the ends counting whole.
struct ScaleBlock {
  int64_t rows, cols, bytes;
};
constexpr int64_t kWholeRow = int64_t{1} << 40;
constexpr ScaleBlock kScaleBlock[kFormats] = {{1, 1, 0},         {1, 1, 0},  {128, 128, 4},
                                              {1, kWholeRow, 4}, {1, 32, 2}, {1, 128, 2}};

// One stored projection of one expert, row-major as in the checkpoint.
struct Matrix {
  const uint8_t* data = nullptr;
  const uint8_t* scales = nullptr;
  int64_t rows = 0, cols = 0;
};

// A part of a matrix: stored rows [first, first + count) for `along`, stored columns for `across`.
struct Strip {
  Matrix matrix;
  int64_t first = 0, count = 0;
};

// Strip widths and C rows are multiples of kLine columns, so that a kernel may store whole vectors.
constexpr int64_t kLine = 64;
// Operand rows of a segment start at a multiple of kRowTile rows, with as many readable rows behind the last segment.
constexpr int64_t kRowTile = 32;
// Operand rows are zero from their length to a multiple of kPad columns.
constexpr int64_t kPad = 32;
// Rows of C per product: its 512 x 256 floats stay in L2, and decoding a strip again for each group costs 1/512 of its
// product.
constexpr int64_t kMaxRows = 512;

// along : C[m, n] (+)= sum_k A[m, k] * W[first + n, k]     reduction along the stored row     (forward)
// across: C[m, n] (+)= sum_k A[m, k] * W[k, first + n]     reduction across the stored rows   (backward)
struct Product {
  const void* a;  // [rows, lda], operands, or packed for `along`; rows <= kMaxRows
  int64_t lda;
  int64_t rows;
  Strip strip;
  Strip
      next;  // what this thread reads afterwards in the same direction, to be prefetched; next.matrix.data may be null
  float* c;  // [rows, ldc]; rows and columns up to the next multiples of 16 and of kLine may be overwritten
  int64_t ldc;
  bool add;            // add to C instead of overwriting it
  std::byte* scratch;  // this thread's, scratch_bytes() of the strip's matrix, aligned to 64
  // A kernel's own: fp32 that the matrix's stored rows count for besides their scales, aligned or not, or null.
  const uint8_t* row_scales = nullptr;
};
using Multiply = void (*)(const Product&);
using Pack = void (*)(const void* from, int64_t lda, int64_t count, int64_t first, int64_t rows, int64_t k,
                      int64_t depth, void* packed, int64_t length);
// Scratch of a product: two panels of 256 x 256 bf16, one multiplied while the other is decoded, or strips of fp32 of
// that size; and the tables of a format that has them, 256 bytes for each 128 columns of two rows of blocks. 64 threads
// then take 64 MB together with their results.
constexpr size_t kPanelBytes = size_t{288} << 10;
constexpr size_t scratch_bytes(int64_t cols) { return kPanelBytes + static_cast<size_t>(cols + 127) / 128 * 512; }

// The products of one ISA; null where this ISA leaves a format to a lower one.
struct Gemm {
  const char* name;
  int64_t along_width, across_width;  // strip widths that fill this ISA's scratch
  Multiply along[kFormats];
  Multiply across[kFormats];
  // Nulls, or the layout in which `along` of a format takes a segment's operand rows, padded to whole tiles of 16 rows:
  // packs rows [first, first + count), first a multiple of 16, and columns [k, k + depth), k of 32, of a segment of
  // `rows` operand rows of `length` numbers each.
  Pack pack[kFormats];
  // Null, or what a thread does before its first and after its last product of a job.
  void (*begin)();
  void (*end)();
};

// Everything between the products. `pad` zeros follow the n numbers written to an operand row.
struct Elementwise {
  void (*convert)(const void* from, Dtype from_type, void* to, Dtype to_type, int64_t n, int64_t pad);
  // h = silu(g) * u; g and u are also stored when `saved_g` is not null.
  void (*swiglu)(const float* g, const float* u, int64_t n, int64_t pad, void* saved_g, void* saved_u, void* h,
                 Dtype type);
  // a = W_down^T dy. In place g -> dg, u -> du, for the output scaled by `gate`; returns dot(a, silu(g) * u).
  float (*swiglu_backward)(const float* a, float gate, int64_t n, int64_t pad, void* g, void* u, Dtype type);
  void (*add_scaled)(float scale, const float* from, float* to, int64_t n);
};

// Adapters' products, all in fp32.
struct LowRank {
  // t[m, r] (+)= scale * sum_k x[m, k] w[r, k]
  void (*dots)(const float* x, int64_t ldx, int64_t rows, const float* w, int64_t ldw, int64_t rank, int64_t depth,
               float scale, float* t, int64_t ldt, bool add);
  // c[m, j] += sum_r t[m, r] w[r, j], j < n
  void (*expand)(const float* t, int64_t ldt, int64_t rows, int64_t rank, const float* w, int64_t ldw, int64_t n,
                 float* c, int64_t ldc);
  // w[r, j] += sum_m t[m, r] x[m, j], j < n
  void (*outer)(const float* t, int64_t ldt, int64_t rows, int64_t rank, const float* x, int64_t ldx, int64_t n,
                float* w, int64_t ldw);
  // to[c, r] (+)= from[r, c]
  void (*transpose)(const float* from, int64_t ldf, int64_t rows, int64_t cols, float* to, int64_t ldt, bool add);
  // Zeroes those of elements [first, first + n) of a route's input that its adapter's dropout takes away.
  void (*drop)(float* x, int64_t first, int64_t n, const uint32_t* seed, uint32_t projection, uint32_t route,
               uint32_t threshold);
};

// The tables, one per kernel file; those a compiler or CPU architecture cannot build are absent.
struct FloatKernels {
  Gemm gemm;
  Elementwise elementwise;
  LowRank low_rank;
};
extern const FloatKernels kScalarKernels;
extern const FloatKernels kAvx2Kernels;
extern const FloatKernels kAvx512Kernels;
extern const Gemm kAvx512Bf16Gemm;
extern const Gemm kAmxGemm;
extern const Gemm kAmxSoftGemm;

}  // namespace kjax
