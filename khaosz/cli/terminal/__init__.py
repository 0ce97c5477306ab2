"""`khaosz chat`: a conversation in the terminal.

`conversation` says what one is and what whoever answers must be able to do; `local` answers by a
model in this process, `server` by one at an address. `commands` are the lines that begin with /,
`lines` reads what is typed, `chat` joins them.
"""
