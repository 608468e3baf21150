# SPDX-License-Identifier: Apache-2.0
"""The user's expert modules: calling them, recognising MLPs, stacking their parameters.

Face:
    calls.run_expert, run_experts, run_container   call modules on rows of tokens
    mlp.RecognisedExperts, ExpertMLP               recognise modules that compute an MLP
    stacked.StackedExperts                         DeepSpeed's Experts with stacked parameters
    views.find_stack                               the stack behind some modules' parameters
"""
