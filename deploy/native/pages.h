/* Which pages of onnxruntime's code a process keeps in memory. */
#ifndef PAGES_H
#define PAGES_H

/* Give back what only loading needed; what runs next comes back from the system's file cache. On Linux. */
void release_code(void);

#endif
