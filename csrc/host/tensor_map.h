// SPDX-License-Identifier: Apache-2.0
// Describing a matrix to the copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace comet_ds {

// [batch, rows, cols], contiguous, 2-byte elements.
struct Matrix {
    uintptr_t address;
    int64_t batch;
    int64_t rows;
    int64_t cols;
};

constexpr int kBoxCols = 64;

// Throws std::runtime_error where the copy engine cannot address the matrix: it wants the address
// and the length of a row to be multiples of 16 bytes.
inline CUtensorMap encode_tensor_map(const Matrix& m, bool is_bfloat16, int box_rows) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found);
        if (function == nullptr) throw std::runtime_error("cuTensorMapEncodeTiled not found");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    constexpr uint64_t kElementBytes = 2;
    const cuuint64_t sizes[3] = {uint64_t(m.cols), uint64_t(m.rows), uint64_t(m.batch)};
    const cuuint64_t strides[2] = {m.cols * kElementBytes, m.rows * m.cols * kElementBytes};
    const cuuint32_t box[3] = {kBoxCols, cuuint32_t(box_rows), 1};
    const cuuint32_t element_strides[3] = {1, 1, 1};
    CUtensorMap map;
    const CUresult result = encode(
        &map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
        reinterpret_cast<void*>(m.address), sizes, strides, box, element_strides,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("no tensor map for a matrix at " + std::to_string(m.address) +
                                 " of size " + std::to_string(m.batch) + " x " +
                                 std::to_string(m.rows) + " x " + std::to_string(m.cols));
    }
    return map;
}

}  // namespace comet_ds
