"""The method done with diffusers, accelerate, torch-fidelity and optuna."""
