"""Text in, batches out: tokenizer, preparation, token files, packing, sampling, chat records.

Nothing here is imported eagerly: `khaosz data prepare` runs many processes that must not pay
for importing torch.
"""
