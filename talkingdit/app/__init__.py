# SPDX-License-Identifier: Apache-2.0
"""The web app: `talkingdit app`, see docs/app.md.

    server.py    the program: a folder of its own, gradio's page and our files behind one guard
    guard.py     who may ask for what: password, host, whose file it is
    page.py      the page; form.py makes its fields from a family's options; views.py the words and pictures on it
    api.py       what programs may call
    runs.py      runs as folders on the disk, with what was asked for
    queue.py     one run at a time, in a process of its own; worker.py is that process
    asked.py     from what was asked for to a job that is possible

Neither gradio nor torch is loaded by naming the package.
"""
