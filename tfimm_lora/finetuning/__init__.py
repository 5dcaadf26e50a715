"""Fine-tuning on labelled pictures: data, training, evaluation and report."""
