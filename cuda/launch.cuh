// How a family covers its chunks: V elements a thread, whole blocks and rotated runs in one CTA, rows in grid.y.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "codec.h"
#include "rotation.cuh"

namespace commq::cuda {

struct Launch {
  int64_t chunk_numel;
  int64_t rows;
  bool aligned;  // every pointer and row stride is a multiple of 16 bytes
  cudaStream_t stream;

  // kernel(args, first row, aligned) for every row.
  template <class Args>
  void operator()(void (*kernel)(Args, int64_t, bool), const Args& args) const {
    constexpr int64_t MOST_ROWS = 65535;
    constexpr int64_t TILE = V * THREADS;
    const int64_t tiles = (chunk_numel + TILE - 1) / TILE;
    for (int64_t first = 0; tiles > 0 && first < rows; first += MOST_ROWS) {
      const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(std::min(rows - first, MOST_ROWS)));
      kernel<<<grid, THREADS, 0, stream>>>(args, first, aligned);
    }
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string("commq kernel: ") + cudaGetErrorString(error));
  }
};

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline bool aligned(const uint8_t* wire, const Layout& layout) {
  return aligned(wire) && (layout.rows == 1 || layout.row_stride % 16 == 0);
}

}  // namespace commq::cuda
