"""Datasets: formats, chat templates, tokenizers, masks, packing, and a look at what is trained."""

from kjax.data.batches import IGNORE, Batches
from kjax.data.dataset import Dataset, Example, Report, held_out, load, tokenize
from kjax.data.formats import Conversation, Message, load_conversations
from kjax.data.tokenizer import Tokenizer, check_ids

__all__ = ["IGNORE", "Batches", "Conversation", "Dataset", "Example", "Message", "Report", "Tokenizer", "check_ids",
           "held_out", "load", "load_conversations", "tokenize"]
