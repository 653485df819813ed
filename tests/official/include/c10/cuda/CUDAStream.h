// What the host code of the official extensions asks of CUDA before a launch, on a machine without it.
#pragma once

#include <c10/core/Device.h>

using cudaStream_t = void *;

namespace at::cuda {
struct Stream {
    cudaStream_t stream() const { return nullptr; }
};
inline Stream getCurrentCUDAStream() { return {}; }
struct CUDAGuard {
    explicit CUDAGuard(c10::Device) {}
};
}  // namespace at::cuda
