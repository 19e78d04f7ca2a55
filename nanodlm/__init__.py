"""nanodlm: diffusion language models in JAX.

Notation, used in every module:

| name              | meaning                                                  | shape         |
|-------------------|----------------------------------------------------------|---------------|
| x0                | clean tokens, int32                                      | [B, L]        |
| xt, xs            | noisy tokens at times s < t                              | [B, L]        |
| t, s              | time, 0 clean, 1 noise                                   | [B]           |
| alpha_t           | P(token kept at t)                                       | [B]           |
| logits, log_p     | unnormalised, log_softmax; float32                       | [B, L, V]     |
| hidden            | what the network returns before the output projection    | [B, L, D]     |
| loss, nll         | what is minimised, what is reported; nats per token      | [B, L]        |
| weight            | 1 counts, 0 padding or prompt                            | [B, L]        |
| fixed             | positions a sampler may not touch                        | [B, L] bool   |
| key, keys         | one PRNG key; one per example                            | [], [B]       |
| mask_id           | the mask's id, always vocab_size - 1                     |               |
| vocab_size        | number of ids, mask_id included                          |               |

Verbs: make_* builds from a config section, sample_* takes a key, init_* makes
state. Units stand in names: num_*, *_every_steps, *_secs, *_bytes. Metrics are
named split/name: train/loss, eval/nll, eval/bits_per_byte.
"""
