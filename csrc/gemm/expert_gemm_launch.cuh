// SPDX-License-Identifier: Apache-2.0
// Launchers of expert_gemm.cuh: one kernel per pass, gated or not where the pass depends on it,
// activation where the pass has one, and with or without communication. Each element type is
// instantiated in a file of its own, so that they compile at the same time.
#pragma once

#include "gemm/expert_gemm.cuh"
#include "host/launch.h"

namespace comet_ds {

template <typename Params>
struct GemmLauncher {
    const Params& params;
    const Communication& communication;
    int num_sms;
    cudaStream_t stream;

    template <typename C>
    void run() const {
        const int num_comm_ctas = communication.num_comm_ctas;
        if (num_comm_ctas == 0) return run<C>(NoCommunication{});
        if (num_comm_ctas < 0 || num_comm_ctas % 2 != 0 || num_comm_ctas >= num_sms - 1) {
            throw std::invalid_argument("communication CTAs must be an even number below " +
                                        std::to_string(num_sms - 1) + ", got " +
                                        std::to_string(num_comm_ctas));
        }
        if constexpr (C::kPass == Pass::kUpGrad) {
            throw std::invalid_argument("this pass overlaps no communication");
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

template <typename Element, bool kGated, typename Params>
void launch_gated(const ExpertGemmVariant& variant, const GemmLauncher<Params>& launcher) {
    constexpr Pass kPass = Params::kPass;
    using A = Activation;
    if constexpr (kPass != Pass::kUp && kPass != Pass::kDownGrad) {
        return launcher.template run<ExpertGemmConfig<Element, kPass, kGated>>();
    } else {
        switch (variant.activation) {
            case A::kGelu:
                return launcher.template run<ExpertGemmConfig<Element, kPass, kGated, A::kGelu>>();
            case A::kGeluTanh:
                return launcher
                    .template run<ExpertGemmConfig<Element, kPass, kGated, A::kGeluTanh>>();
            case A::kRelu:
                return launcher.template run<ExpertGemmConfig<Element, kPass, kGated, A::kRelu>>();
            case A::kSilu:
                return launcher.template run<ExpertGemmConfig<Element, kPass, kGated, A::kSilu>>();
        }
    }
}

template <typename Element, typename Params>
void launch_expert_gemm(const Params& params, const ExpertGemmVariant& variant,
                        const Communication& communication, int num_sms, cudaStream_t stream) {
    constexpr Pass kPass = Params::kPass;
    const GemmLauncher<Params> launcher{params, communication, num_sms, stream};
    if constexpr (kPass == Pass::kDown || kPass == Pass::kWeightGrad) {
        launch_gated<Element, false>(variant, launcher);
    } else {
        variant.is_gated ? launch_gated<Element, true>(variant, launcher)
                         : launch_gated<Element, false>(variant, launcher);
    }
}

// Declares (KEYWORD is `extern template`) or instantiates (`template`) an element type's launchers.
#define COMET_EXPERT_GEMM(KEYWORD, ELEMENT, PARAMS)                                              \
    KEYWORD void launch_expert_gemm<ELEMENT>(const PARAMS&, const ExpertGemmVariant&,            \
                                             const Communication&, int, cudaStream_t)
#define COMET_EXPERT_GEMMS(KEYWORD, ELEMENT)             \
    COMET_EXPERT_GEMM(KEYWORD, ELEMENT, UpParams);       \
    COMET_EXPERT_GEMM(KEYWORD, ELEMENT, DownParams);     \
    COMET_EXPERT_GEMM(KEYWORD, ELEMENT, DownGradParams); \
    COMET_EXPERT_GEMM(KEYWORD, ELEMENT, UpGradParams);   \
    COMET_EXPERT_GEMM(KEYWORD, ELEMENT, WeightGradParams)

COMET_EXPERT_GEMMS(extern template, __nv_bfloat16);
COMET_EXPERT_GEMMS(extern template, __half);

}  // namespace comet_ds
