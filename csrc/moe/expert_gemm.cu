// SPDX-License-Identifier: Apache-2.0
// Launchers of expert_gemm.cuh: one instantiation per pass, dtype, form and activation.
#include "expert_gemm.cuh"

#include "device/launch.h"

namespace comet_ds {
namespace {

struct Launch {
    const ExpertGemmParams& params;
    const Communication& communication;
    int num_sms;
    cudaStream_t stream;

    template <typename C>
    void run() const {
        const int num_ctas = num_sms / C::kClusterSize * C::kClusterSize;
        const int set_apart = communication.num_ctas;
        if (set_apart < 0 || set_apart % 2 != 0 || set_apart >= num_ctas) {
            throw std::invalid_argument("the CTAs that communicate must be an even number below " +
                                        std::to_string(num_ctas) + ", got " +
                                        std::to_string(set_apart));
        }
        const auto kernel = expert_gemm_kernel<C>;
        const auto kSmem = cudaFuncAttributeMaxDynamicSharedMemorySize;
        check(cudaFuncSetAttribute(kernel, kSmem, C::kSmemBytes), "expert_gemm");
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {C::kClusterSize, 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = num_ctas;
        config.blockDim = C::kThreads;
        config.dynamicSmemBytes = C::kSmemBytes;
        config.stream = stream;
        config.attrs = &cluster;
        config.numAttrs = 1;
        check(cudaLaunchKernelEx(&config, kernel, params, communication), "expert_gemm");
    }
};

template <typename Element, Pass kPass, bool kGated>
void launch_activation(Activation activation, const Launch& launch) {
    using A = Activation;
    switch (activation) {
        case A::kGelu: return launch.run<ExpertGemmConfig<Element, kPass, kGated, A::kGelu>>();
        case A::kGeluTanh:
            return launch.run<ExpertGemmConfig<Element, kPass, kGated, A::kGeluTanh>>();
        case A::kRelu: return launch.run<ExpertGemmConfig<Element, kPass, kGated, A::kRelu>>();
        case A::kSilu: return launch.run<ExpertGemmConfig<Element, kPass, kGated, A::kSilu>>();
    }
}

template <typename Element, bool kGated>
void launch_pass(const ExpertGemmVariant& v, const Launch& launch) {
    switch (v.pass) {
        case Pass::kUp:
            return launch_activation<Element, Pass::kUp, kGated>(v.activation, launch);
        case Pass::kDown: return launch.run<ExpertGemmConfig<Element, Pass::kDown, false>>();
        case Pass::kDownGrad:
            return launch_activation<Element, Pass::kDownGrad, kGated>(v.activation, launch);
        case Pass::kUpGrad: return launch.run<ExpertGemmConfig<Element, Pass::kUpGrad, kGated>>();
        case Pass::kWeightGrad:
            return launch.run<ExpertGemmConfig<Element, Pass::kWeightGrad, false>>();
    }
}

}  // namespace

void expert_gemm(const ExpertGemmParams& params, const ExpertGemmVariant& v,
                 const Communication& communication, int num_sms, cudaStream_t stream) {
    const Launch launch{params, communication, num_sms, stream};
    if (v.is_bfloat16) {
        v.is_gated ? launch_pass<__nv_bfloat16, true>(v, launch)
                   : launch_pass<__nv_bfloat16, false>(v, launch);
    } else {
        v.is_gated ? launch_pass<__half, true>(v, launch) : launch_pass<__half, false>(v, launch);
    }
}

}  // namespace comet_ds
