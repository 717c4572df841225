"""Networks and rules that give integers: image tokenizers (codes) and text tokenizers (ids)."""

from arra.tokenizers.image import EMBEDDED, PUBLISHED, ImageTokenizer, load_tokenizer

__all__ = ["EMBEDDED", "PUBLISHED", "ImageTokenizer", "load_tokenizer"]
