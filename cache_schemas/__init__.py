"""What the bytes of a teacher cache mean.

One idea: whoever can import this package can read a cache, without torch, vLLM or the rest of
stillroom. It holds the kinds of signal, the codecs, the plan and the manifest. It does no
training, runs no teacher and decides no policy.
"""
