#include "cuda/launchers.h"

namespace lk::cuda {

bool lora_takes(const LinearArgs&) { return false; }
int64_t lora_workspace(const LinearArgs&, int) { return 0; }
cudaError_t lora_shrink(const LinearArgs&, const Launch&) { return cudaErrorInvalidValue; }
bool lora_takes(const BackwardArgs&) { return false; }
int64_t lora_workspace(const BackwardArgs&, int) { return 0; }
cudaError_t lora_gradients(const BackwardArgs&, const Launch&) { return cudaErrorInvalidValue; }

}  // namespace lk::cuda
