"""The experiment as a graph of stages, each made once and kept."""
