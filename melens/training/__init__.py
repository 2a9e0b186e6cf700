"""Training with WeMask: SFT, DPO and GRPO on TRL's trainers, and gated attention beside it (tables 1-4, 6 and 7)."""
