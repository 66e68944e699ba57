"""The method done with diffusers, torch-fidelity and optuna."""
