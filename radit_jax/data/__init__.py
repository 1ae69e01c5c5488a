"""From files to packed batches; numpy only, so that data workers start no backend."""
