"""The data owner's side of serving: sequences unrolled token by token, many at once, and the API that users call.

`text.py` turns tokens into text as they come, `drafts.py` guesses ahead, `unroller.py` decodes all sequences together
over a `Stepper`, `protocol.py` and `api.py` speak OpenAI's language. Knows the line, not the PLM.
"""
