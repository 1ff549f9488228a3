#include "cuda/launchers.h"

namespace lk::cuda {

bool tile_takes(const LinearArgs&) { return false; }
int64_t tile_workspace(const LinearArgs&, int) { return 0; }
cudaError_t tile_linear(const LinearArgs&, const Launch&) { return cudaErrorInvalidValue; }
bool tile_takes(const BackwardArgs&) { return false; }
int64_t tile_workspace(const BackwardArgs&, int) { return 0; }
cudaError_t tile_dx(const BackwardArgs&, const Launch&) { return cudaErrorInvalidValue; }

}  // namespace lk::cuda
