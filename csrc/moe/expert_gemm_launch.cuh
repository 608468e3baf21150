// SPDX-License-Identifier: Apache-2.0
// Launchers of expert_gemm.cuh: one instantiation per pass, form, activation, and with or without
// communication. Every element type has a file of its own, which compile at the same time.
#pragma once

#include "device/launch.h"
#include "expert_gemm.cuh"

namespace comet_ds {

struct Launch {
    const ExpertGemmParams& params;
    const Communication& communication;
    int num_sms;
    cudaStream_t stream;

    template <typename C>
    void run() const {
        const int set_apart = communication.num_ctas;
        if (set_apart == 0) return run<C>(NoCommunication{});
        if (set_apart < 0 || set_apart % 2 != 0 || set_apart >= num_sms - 1) {
            throw std::invalid_argument("the CTAs that communicate must be an even number below " +
                                        std::to_string(num_sms - 1) + ", got " +
                                        std::to_string(set_apart));
        }
        if constexpr (C::kPass == Pass::kUpGrad) {
            throw std::invalid_argument("nothing communicates beside this pass");
        } else {
            run<typename C::Communicating>(communication);
        }
    }

    template <typename C>
    void run(const typename C::Comm& comm) const {
        const auto kernel = expert_gemm_kernel<C>;
        const auto kSmem = cudaFuncAttributeMaxDynamicSharedMemorySize;
        check(cudaFuncSetAttribute(kernel, kSmem, C::kSmemBytes), "expert_gemm");
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {C::kClusterSize, 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = num_sms / C::kClusterSize * C::kClusterSize;
        config.blockDim = C::kThreads;
        config.dynamicSmemBytes = C::kSmemBytes;
        config.stream = stream;
        config.attrs = &cluster;
        config.numAttrs = 1;
        check(cudaLaunchKernelEx(&config, kernel, params, comm), "expert_gemm");
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

template <typename Element>
void launch_expert_gemm(const ExpertGemmVariant& v, const Launch& launch) {
    v.is_gated ? launch_pass<Element, true>(v, launch) : launch_pass<Element, false>(v, launch);
}

extern template void launch_expert_gemm<__nv_bfloat16>(const ExpertGemmVariant&, const Launch&);
extern template void launch_expert_gemm<__half>(const ExpertGemmVariant&, const Launch&);

}  // namespace comet_ds
