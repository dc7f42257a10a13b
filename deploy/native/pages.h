/* Pages of memory: which of onnxruntime's code a process keeps, and how its heap gets them. */
#ifndef PAGES_H
#define PAGES_H

/* Give back what only loading needed; what runs next comes back from the system's file cache. On Linux. */
void release_code(void);

/* Have the heap's first pages at once, in place of a fault for each; for a program, before it takes any memory. */
void prepare_heap(void);

#endif
