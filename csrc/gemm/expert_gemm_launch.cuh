// SPDX-License-Identifier: Apache-2.0
// Launchers of expert_gemm.cuh: one instantiation per pass, form, activation, and with or without
// communication. Every element type has a file of its own, which compile at the same time.
#pragma once

#include "gemm/expert_gemm.cuh"
#include "host/launch.h"

namespace comet_ds {

struct GemmLauncher {
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
        const unsigned num_ctas = num_sms / C::kClusterSize * C::kClusterSize;
        launch("expert_gemm", expert_gemm_kernel<C>,
               {num_ctas, C::kThreads, C::kSmemBytes, C::kClusterSize}, stream, params, comm);
    }
};

template <typename Element, Pass kPass, bool kGated>
void launch_activation(Activation activation, const GemmLauncher& launcher) {
    using A = Activation;
    switch (activation) {
        case A::kGelu: return launcher.run<ExpertGemmConfig<Element, kPass, kGated, A::kGelu>>();
        case A::kGeluTanh:
            return launcher.run<ExpertGemmConfig<Element, kPass, kGated, A::kGeluTanh>>();
        case A::kRelu: return launcher.run<ExpertGemmConfig<Element, kPass, kGated, A::kRelu>>();
        case A::kSilu: return launcher.run<ExpertGemmConfig<Element, kPass, kGated, A::kSilu>>();
    }
}

template <typename Element, bool kGated>
void launch_pass(const ExpertGemmVariant& v, const GemmLauncher& launcher) {
    switch (v.pass) {
        case Pass::kUp:
            return launch_activation<Element, Pass::kUp, kGated>(v.activation, launcher);
        case Pass::kDown: return launcher.run<ExpertGemmConfig<Element, Pass::kDown, false>>();
        case Pass::kDownGrad:
            return launch_activation<Element, Pass::kDownGrad, kGated>(v.activation, launcher);
        case Pass::kUpGrad: return launcher.run<ExpertGemmConfig<Element, Pass::kUpGrad, kGated>>();
        case Pass::kWeightGrad:
            return launcher.run<ExpertGemmConfig<Element, Pass::kWeightGrad, false>>();
    }
}

template <typename Element>
void launch_expert_gemm(const ExpertGemmVariant& v, const GemmLauncher& launcher) {
    v.is_gated ? launch_pass<Element, true>(v, launcher) : launch_pass<Element, false>(v, launcher);
}

extern template void launch_expert_gemm<__nv_bfloat16>(const ExpertGemmVariant&,
                                                       const GemmLauncher&);
extern template void launch_expert_gemm<__half>(const ExpertGemmVariant&, const GemmLauncher&);

}  // namespace comet_ds
