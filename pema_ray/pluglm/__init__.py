"""PlugLM (Cheng et al., Findings of ACL 2023): an encoder with an editable memory of its knowledge.

The last layers of a BERT-family encoder attend to a key-value memory of documents, instead of or beside their
feed-forward network. Knows torch, transformers and Ray; knows no owner.

    model           PlugLMModel, PlugLMForMaskedLM: `attach(knowledge)`, then call them like any transformers model
    knowledge       `Knowledge`, the interface of a memory; `LocalKnowledge`, a memory in this process
    sharded         `ShardedKnowledge`: a memory over Ray actors, one for each part
    knowledge_memory  `KnowledgeMemory`, the memory on disk: build, add, replace, delete, concat, swap, load
    encoding        `DocumentEncoder`: encodes texts as tokens, keys and values; its fingerprint marks memories
    pretrain        masked language modelling with a memory that is refreshed every n steps

An example, in one process:

    model, tokenizer = load_pluglm("folder")                 # loading.py; or PlugLMForMaskedLM.from_backbone("bert")
    encoder = DocumentEncoder(model, tokenizer)
    memory = KnowledgeMemory.build("memory", [NewEntry("Paris is in France.", source="atlas")], encoder)
    model.attach(memory.load(encoder.fingerprint))
    memory = memory.replace(0, NewEntry("Paris is in Texas.", source="atlas"), encoder)     # publishes version 2
    model.attach(memory.load(encoder.fingerprint))

Shapes: B sequences, T positions, D hidden size (d), Q query size (d_q), K retrieved entries (k), H heads, N entries of
the memory, M entries of any choice, L tokens of a document.
"""
