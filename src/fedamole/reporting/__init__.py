"""Tables, figures, model cards and the HTML report, computed from run folders. Needs no PyTorch (cards apart)."""
