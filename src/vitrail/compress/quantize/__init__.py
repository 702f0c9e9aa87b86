"""What quantisation systems share: the quantiser, quantised layers, batch-norm folding, capture of activations."""
