"""MM-Rec in Hugging Face `transformers`: configuration, model and cache.

Importing this package registers them, so that ``AutoModelForCausalLM.from_pretrained(folder)`` loads a checkpoint or
exported folder. Without the import, ``trust_remote_code=True`` does the same through the folder's modeling file.
"""

from mm_rec.errors import MissingPackageError

try:
    import transformers  # noqa: F401 (asked for first, so that its absence ends in one line)
except ImportError:
    raise MissingPackageError("mm_rec.hf", "transformers") from None

from mm_rec.hf.cache import MMRecCache
from mm_rec.hf.configuration import MMRecConfig
from mm_rec.hf.modeling import MMRecForCausalLM

__all__ = ["MMRecCache", "MMRecConfig", "MMRecForCausalLM"]
