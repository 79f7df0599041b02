"""lcm-rt: a self-hosted real-time image server for Latent Consistency Models."""

__version__ = "0.1.0"
