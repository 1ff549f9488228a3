// Torch tensors to the plain argument structs of the kernels, on the LibTorch stable ABI.
// User-facing checks are in Python (schema.py); here only what memory safety needs is checked
// again: every tensor on one device, sizes and dtypes that the struct promises.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/params.h"

namespace lk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;
using Flags = std::vector<bool>;

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(size), type);
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size) {
  return empty(like, size, like.scalar_type());
}

// Sizes from outside are bounded where they come in, so that sums of a few of them, rounded up to
// whatever a kernel needs, cannot overflow; products are checked one by one.
constexpr int64_t kMaxSize = int64_t{1} << 48;

inline int64_t checked_size(const char* name, int64_t size) {
  STD_TORCH_CHECK(size >= 0 && size <= kMaxSize, name, ": expected a size of 0..2^48, got ", size);
  return size;
}

inline int64_t checked_product(const char* names, int64_t a, int64_t b) {
  int64_t product = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &product), names,
                  ": expected sizes whose product fits 64 bits, got ", a, " and ", b);
  return product;
}

// Lists of a group have an entry for each weight. None is a tensor of shape [0] there, for torch
// resolves views that negate in lists of tensors, and in lists of optional ones does not.
inline MaybeTensor maybe(const Tensor& t) {
  return t.dim() == 1 && t.numel() == 0 ? MaybeTensor{} : MaybeTensor{t};
}
// Entry i of a list that is empty where no weight has one.
inline MaybeTensor maybe(const Tensors& list, size_t i) {
  return list.empty() ? MaybeTensor{} : maybe(list[i]);
}

template <class List>
void check_length(const char* name, const List& list, size_t length) {
  STD_TORCH_CHECK(list.size() == length, name, ": expected ", length, " entries, got ",
                  list.size());
}

inline int shift_of(int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0,
                  "blocksize: expected a power of two in 32..4096, got ", blocksize);
  return __builtin_ctzll(static_cast<unsigned long long>(blocksize));
}

inline DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline MutMatrix output(const Tensor& t, int64_t rows, int64_t cols) {
  return {t.mutable_data_ptr(), dtype_of("output", t), rows, cols, cols};
}

// Unpacks the tensors of one call, all of which must be where the first one is.
class Unpack {
 public:
  explicit Unpack(const Tensor& first)
      : is_cpu_(first.is_cpu()), index_(first.get_device_index()) {}

  void check_device(const char* name, const Tensor& t) const {
    if (is_cpu_) {
      STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
    } else {
      STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == index_, name,
                      ": expected a tensor on cuda:", index_, ", got one on ",
                      t.is_cpu() ? "the CPU" : "another device");
    }
  }

  // `t` itself, or a copy with rows that lie element by element.
  Tensor rows_of(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.dim() == 2, name, ": expected a matrix, got ", t.dim(), " dimensions");
    for (int64_t i = 0; i < 2; ++i) checked_size(name, t.size(i));
    check_device(name, t);
    const bool ok =
        (t.size(1) <= 1 || t.stride(1) == 1) && (t.size(0) <= 1 || t.stride(0) >= t.size(1));
    return ok ? t : torch::stable::contiguous(t);
  }

  Matrix matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) const {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name,
                    ": expected shape [", rows, ", ", cols, "], got ", t.dim(), " dimensions of ",
                    t.numel(), " elements");
    return {t.const_data_ptr(), dtype_of(name, t), rows, cols, rows > 1 ? t.stride(0) : cols};
  }

  Vector vector(const char* name, const Tensor& t, int64_t size) const {
    STD_TORCH_CHECK(t.dim() == 1 && t.numel() == size, name, ": expected ", size, " elements, got ",
                    t.numel());
    check_device(name, t);
    return {t.const_data_ptr(), dtype_of(name, t)};
  }

  template <class T>
  const T* data(const char* name, const Tensor& t, ScalarType type, int64_t numel) const {
    STD_TORCH_CHECK(t.scalar_type() == type && t.numel() == numel && t.is_contiguous(), name,
                    ": expected ", numel, " contiguous elements of the schema's dtype, got ",
                    t.numel());
    check_device(name, t);
    return static_cast<const T*>(t.const_data_ptr());
  }

  Weight4 weight4(const Tensor& packed, const Tensor& absmax, const Tensor& code,
                  const MaybeTensor& nested_absmax, const MaybeTensor& nested_code,
                  const MaybeTensor& nested_offset, int64_t N, int64_t K, int64_t blocksize) const {
    Weight4 w;
    w.block_shift = shift_of(blocksize);
    w.N = checked_size("N", N);
    w.K = checked_size("K", K);
    const int64_t numel = checked_size("N * K", checked_product("N, K", N, K));
    // Exactly: a packed weight that somebody cast to a wider dtype has too many bytes.
    const int64_t item = static_cast<int64_t>(packed.element_size());
    const int64_t bytes = packed.numel() * item;
    const int64_t expected = ceil_div(ceil_div(numel, 2), item) * item;
    STD_TORCH_CHECK(packed.is_contiguous() && bytes == expected, "packed: expected ", expected,
                    " contiguous bytes, got ", bytes);
    check_device("packed", packed);
    w.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
    w.code = data<float>("code", code, ScalarType::Float, 16);
    const int64_t blocks = ceil_div(numel, blocksize);
    if (nested_absmax) {
      STD_TORCH_CHECK(nested_code && nested_offset,
                      "nested_code, nested_offset: expected tensors, got None");
      w.absmax_u8 = data<uint8_t>("absmax", absmax, ScalarType::Byte, blocks);
      w.nested_absmax = data<float>("nested_absmax", *nested_absmax, ScalarType::Float,
                                    ceil_div(blocks, kNestedBlock));
      w.nested_code = data<float>("nested_code", *nested_code, ScalarType::Float, 256);
      w.nested_offset = data<float>("nested_offset", *nested_offset, ScalarType::Float, 1);
    } else {
      w.absmax = data<float>("absmax", absmax, ScalarType::Float, blocks);
    }
    return w;
  }

  // The weights of a group: `tensors` has the six of each, `dims` its N, K and blocksize. All have
  // one K.
  std::vector<Weight4> weights(const Tensors& tensors, const Integers& dims) const {
    const size_t count = dims.size() / 3;
    STD_TORCH_CHECK(count > 0, "dims: expected N, K and blocksize of each weight, got ",
                    dims.size(), " integers");
    check_length("dims", dims, 3 * count);
    check_length("weights", tensors, 6 * count);
    std::vector<Weight4> found;
    found.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const Tensor* t = &tensors[6 * i];
      const int64_t* d = &dims[3 * i];
      const bool nested = maybe(t[4]).has_value();
      const auto if_nested = [&](const Tensor& of) {
        return nested ? MaybeTensor{of} : MaybeTensor{};
      };
      found.push_back(weight4(t[0], t[1], t[2], if_nested(t[3]), if_nested(t[4]), if_nested(t[5]),
                              d[0], d[1], d[2]));
      STD_TORCH_CHECK(found[i].K == found[0].K, "dims: expected one K, got ", found[0].K, " and ",
                      found[i].K);
    }
    return found;
  }

  // The integers of a plan are checked by check_indices(); those of another device cannot be read
  // here.
  BatchPlan plan(const Tensor& tiles, const Tensor& page_ids, const Tensor& tile_of_row,
                 const Tensor& rows, int64_t tile_rows, int64_t max_rank, int64_t M) const {
    STD_TORCH_CHECK(tile_rows == 16 || tile_rows == 32 || tile_rows == 64 || tile_rows == 128,
                    "tile_rows: expected 16, 32, 64 or 128, got ", tile_rows);
    STD_TORCH_CHECK(max_rank >= 0 && max_rank < (1 << 24), "max_rank: expected a rank, got ",
                    max_rank);
    BatchPlan p;
    p.row_count = rows.numel();
    p.tile_count = tiles.numel() / 4;
    p.page_count = page_ids.numel();
    p.tiles = reinterpret_cast<const Tile*>(
        data<int32_t>("tiles", tiles, ScalarType::Int, p.tile_count * 4));
    p.page_ids = data<int32_t>("page_ids", page_ids, ScalarType::Int, p.page_count);
    p.tile_of_row = data<int32_t>("tile_of_row", tile_of_row, ScalarType::Int, M);
    p.rows = data<int32_t>("rows", rows, ScalarType::Int, p.row_count);
    p.tile_rows = static_cast<int>(tile_rows);
    p.max_rank = static_cast<int>(max_rank);
    return p;
  }

  Pages pages(const Tensor& A_pages, const Tensor& B_pages, const Tensor& ranks,
              const Tensor& scalings, const Tensor& dropout_p, const MaybeTensor& seed, int64_t N,
              int64_t K) const {
    STD_TORCH_CHECK(A_pages.dim() == 3 && B_pages.dim() == 3,
                    "A_pages, B_pages: expected [pages, page_rank, K] and [pages, page_rank, N]");
    Pages p;
    const int64_t count = checked_size("A_pages", A_pages.size(0));
    p.page_rank = checked_size("page_rank", A_pages.size(1));
    STD_TORCH_CHECK(p.page_rank > 0 && p.page_rank % kRankStep == 0,
                    "page_rank: expected a multiple of ", kRankStep, ", got ", p.page_rank);
    p.A = page_matrix("A_pages", A_pages, count, p.page_rank, K);
    p.B = page_matrix("B_pages", B_pages, count, p.page_rank, N);
    STD_TORCH_CHECK(p.A.dtype == p.B.dtype, "B_pages: expected the dtype of A_pages");
    p.slots = ranks.numel();
    p.ranks = data<int32_t>("ranks", ranks, ScalarType::Int, p.slots);
    p.scalings = data<float>("scalings", scalings, ScalarType::Float, p.slots);
    p.dropout_p = data<double>("dropout_p", dropout_p, ScalarType::Double, p.slots);
    if (seed) p.seed = data<uint64_t>("seed", *seed, ScalarType::Long, 1);
    return p;
  }

  // Checks on a CPU that every index of the plan is inside of what it points into. Indices have 32
  // bits and are added in 64. Every call checks them again: that takes some ten instructions a row,
  // of which the product takes N K / 16 and more, while a mark that says "checked" would outlive a
  // change of the tensors it was made for.
  void check_indices(const BatchPlan& plan, const Pages& pages, int64_t M) const {
    if (!is_cpu_) return;
    const int64_t page_count = pages.A.rows / pages.page_rank;
    bool ok = true;
    int64_t next = 0;
    for (int64_t i = 0; i < plan.tile_count && ok; ++i) {
      const Tile& t = plan.tiles[i];
      if (t.rows == 0) continue;
      ok = t.slot >= 0 && t.slot < pages.slots && t.rows > 0 && t.rows <= plan.tile_rows &&
           t.row0 == next && next + t.rows <= plan.row_count && t.page0 >= 0;
      if (!ok) break;
      next += t.rows;
      const int64_t rank = pages.ranks[t.slot];
      ok = rank >= 0 && rank <= plan.max_rank &&
           t.page0 + ceil_div(rank, pages.page_rank) <= plan.page_count;
    }
    for (int64_t i = 0; i < next && ok; ++i) ok = plan.rows[i] >= 0 && plan.rows[i] < M;
    for (int64_t i = 0; i < plan.page_count && ok; ++i)
      ok = plan.page_ids[i] >= 0 && plan.page_ids[i] < page_count;
    for (int64_t m = 0; m < M && ok; ++m) {
      const int32_t t = plan.tile_of_row[m];
      ok = t == -1 || (t >= 0 && t < plan.tile_count && plan.tiles[t].rows > 0);
    }
    STD_TORCH_CHECK(ok, "plan: its indices do not fit these pages and rows");
  }

  void check_grad_rows(const int32_t* grad_rows, const Pages& pages, int64_t grad_rank) const {
    if (!is_cpu_) return;
    for (int64_t u = 0; u < pages.slots; ++u) {
      const int64_t first = grad_rows[u], rank = pages.ranks[u];
      STD_TORCH_CHECK(first < 0 || (rank >= 0 && first + rank <= grad_rank),
                      "grad_rows: expected rows below grad_rank = ", grad_rank, ", got rows from ",
                      first, " for the ", rank, " ranks of slot ", u);
    }
  }

  // Checks that the rows of all experts are rows of x, where the host can read the offsets.
  static void check_offsets(const Experts& x, int64_t M) {
    int64_t before = 0;
    for (int64_t e = 0; e < x.count; ++e) {
      STD_TORCH_CHECK(x.offsets[e] >= before && x.offsets[e] <= M,
                      "offsets: expected ascending numbers of rows up to ", M, ", got ",
                      x.offsets[e], " for expert ", e, " after ", before);
      before = x.offsets[e];
    }
  }

  Dropout dropout(double p, const MaybeTensor& seed) const {
    if (p == 0.0) return {};
    STD_TORCH_CHECK(p > 0.0 && p < 1.0 && seed, "dropout_p: expected 0 <= p < 1 and a seed, got ",
                    p);
    return dropout_of(p, data<uint64_t>("seed", *seed, ScalarType::Long, 1));
  }

 private:
  Matrix page_matrix(const char* name, const Tensor& t, int64_t pages, int64_t page_rank,
                     int64_t cols) const {
    STD_TORCH_CHECK(
        t.size(0) == pages && t.size(1) == page_rank && t.size(2) == cols && t.is_contiguous(),
        name, ": expected contiguous [", pages, ", ", page_rank, ", ", cols, "]");
    check_device(name, t);
    const int64_t rows = checked_size(name, checked_product(name, pages, page_rank));
    return {t.const_data_ptr(), dtype_of(name, t), rows, checked_size(name, cols), cols};
  }

  bool is_cpu_;
  int index_;
};

// A bias, or none, and what keeps a copy of it alive.
struct Bias {
  MaybeTensor kept;
  Vector vector;

  Bias(const Unpack& in, const MaybeTensor& bias, int64_t N) {
    if (!bias) return;
    kept = torch::stable::contiguous(*bias);
    vector = in.vector("bias", *kept, N);
  }
};

// The adapter's matrices and what keeps copies of them alive.
struct Adapter {
  Tensor A, B;
  Lora lora;

  Adapter(const Unpack& in, const Tensor& a, const Tensor& b, double scaling, double dropout_p,
          const MaybeTensor& seed, int64_t N, int64_t K)
      : A(in.rows_of("A", a)), B(in.rows_of("B", b)) {
    const int64_t R = A.size(0);
    lora = {in.matrix("A", A, R, K), in.matrix("B", B, N, R), static_cast<float>(scaling),
            in.dropout(dropout_p, seed)};
  }
};

}  // namespace lk
