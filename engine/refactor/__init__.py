"""Dense model -> MoE (after Read-ME, arXiv 2410.19123). Knows checkpoints and calibration text, nothing of serving."""
