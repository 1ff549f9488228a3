// The kernel families behind the C interface: which problems each takes, and how it is started.
// Everything here enqueues work on launch.stream and returns.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/launch.h"

namespace lk::cuda {

// -- the entries of CudaTable ---------------------------------------------------------------------

int quantize(const QuantizeArgs& a, const Launch& on);
int64_t double_quantize_workspace(int64_t blocks);
int double_quantize(const DoubleQuantizeArgs& a, const Launch& on);
int dequantize(const Weight4& w, int64_t row, int64_t column, const MutMatrix& out,
               const Launch& on);
LaunchPlan plan_linear(const LinearArgs& a, int device);
int linear(const LinearArgs& a, const LaunchPlan& plan, const Launch& on);
LaunchPlan plan_linear_backward(const BackwardArgs& a, int device);
int linear_backward(const BackwardArgs& a, const LaunchPlan& plan, const Launch& on);
LaunchPlan plan_multi(const MultiArgs& a, int device);
int multi(const MultiArgs& a, const LaunchPlan& plan, const Launch& on);
LaunchPlan plan_multi_backward(const MultiBackwardArgs& a, int device);
int multi_backward(const MultiBackwardArgs& a, const LaunchPlan& plan, const Launch& on);
int grouped(const GroupedArgs& a, const Launch& on);
int grouped_backward(const GroupedBackwardArgs& a, const Launch& on);

// -- a whole linear operator (launch/linear.cu) ---------------------------------------------------
// These compute all but the product of Family::matmul, which is the caller's. The addend comes from
// a kernel that this one may overlap.

cudaError_t linear(LinearArgs a, const LaunchPlan& plan, const EpilogueOperand& addend,
                   const Launch& on);
cudaError_t linear_backward(BackwardArgs a, const LaunchPlan& plan, const EpilogueOperand& addend,
                            const Launch& on);

// -- general, float32 arithmetic (launch/simt.cu): takes everything -------------------------------

cudaError_t simt_shrink(const LinearArgs& a, const Launch& on);  // S
cudaError_t simt_linear(const LinearArgs& a, const EpilogueOperand&,
                        const Launch& on);                     // y, given S
cudaError_t simt_ds(const BackwardArgs& a, const Launch& on);  // dS
cudaError_t simt_dx(const BackwardArgs& a, const EpilogueOperand&,
                    const Launch& on);                                        // dx, given dS
cudaError_t simt_adapter_gradients(const BackwardArgs& a, const Launch& on);  // dA, dB, given dS
cudaError_t bias_gradient(const BackwardArgs& a, const Launch& on);           // dbias

// -- few rows (launch/gemv.cu): y and, with an adapter, S ---------------------------------------

bool gemv_takes(const LinearArgs& a);
int64_t gemv_workspace(const LinearArgs& a, int device);
cudaError_t gemv_linear(const LinearArgs& a, const EpilogueOperand& addend, const Launch& on);

// -- tensor cores on tiles of decoded weights (launch/mma.cu) ------------------------------------
// Without a base only adapter and bias are computed.

bool mma_takes(const LinearArgs& a);
int64_t mma_workspace(const LinearArgs& a, int device);
cudaError_t mma_linear(const LinearArgs& a, const EpilogueOperand&,
                       const Launch& on);  // y, given S
bool mma_takes(const BackwardArgs& a);
int64_t mma_workspace(const BackwardArgs& a, int device);
cudaError_t mma_dx(const BackwardArgs& a, const EpilogueOperand&,
                   const Launch& on);  // dx, given dS

// -- the skinny products of adapters on tensor cores (launch/lora.cu) -----------------------------

bool lora_takes(const Matrix& activations);
bool lora_takes(const LinearArgs& a);
int64_t lora_workspace(const LinearArgs& a, int device);
cudaError_t lora_shrink(const LinearArgs& a, const Launch& on);  // S
bool lora_takes(const BackwardArgs& a);
int64_t lora_workspace(const BackwardArgs& a, int device);
cudaError_t lora_gradients(const BackwardArgs& a, const Launch& on);  // dS, dA, dB, dbias

}  // namespace lk::cuda
