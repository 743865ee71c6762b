"""The peers, which live in the package because ``mm-rec bench --peers`` runs them too."""

from mm_rec.bench.peers import ModernGPT, gpt2_110m

__all__ = ["ModernGPT", "gpt2_110m"]
