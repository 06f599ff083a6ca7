"""World-model pre-training from action-free video: DreamerV2, APV, ContextWM and PreLAR."""
