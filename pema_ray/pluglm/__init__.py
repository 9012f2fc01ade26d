"""PlugLM (Cheng et al., Findings of ACL 2023): an encoder whose knowledge lies in a memory that people edit.

In the last layers of a BERT-family encoder, attention over the entries of a key-value memory of documents takes the
feed-forward network's place, or stands beside it. Knows torch, transformers and Ray; knows no owner.

    model           PlugLMModel, PlugLMForMaskedLM: `attach(knowledge)`, then call them like any transformers model
    knowledge       `Knowledge`, what a model asks of its memory; `LocalKnowledge`, a memory in this process
    sharded         `ShardedKnowledge`: the same, over Ray actors that hold a part each
    knowledge_memory  `KnowledgeMemory`, the memory on disk: build, add, replace, delete, concat, swap, load
    encoding        `DocumentEncoder`: texts to tokens, keys and values, with the fingerprint that memories carry
    pretrain        masked language modelling with a memory that is encoded anew every n steps

A whole round, in one process:

    model, tokenizer = load_pluglm("folder")                 # loading.py; or PlugLMForMaskedLM.from_backbone("bert")
    encoder = DocumentEncoder(model, tokenizer)
    memory = KnowledgeMemory.build("memory", [NewEntry("Paris is in France.", source="atlas")], encoder)
    model.attach(memory.load(encoder.fingerprint))
    memory = memory.replace(0, NewEntry("Paris is in Texas.", source="atlas"), encoder)     # publishes version 2
    model.attach(memory.load(encoder.fingerprint))

Shapes: B sequences, T positions, D hidden size (d), Q query size (d_q), K retrieved entries (k), H heads, N entries of
the memory, M entries of any choice, L tokens of a document.
"""
