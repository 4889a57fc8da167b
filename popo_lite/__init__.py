"""popo-lite: reinforcement learning with verifiable rewards for 4-bit LoRA models, by POPO (arXiv 2605.06650)."""
