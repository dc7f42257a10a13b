#define _POSIX_C_SOURCE 200809L
#include "bundle.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "json.h"
#include "sha256.h"

#define MANIFEST "ryot_manifest.json"
#define SCHEMA 1
#define REBUILD "export it again with 'ryot-deploy export', or copy it to the device again"

/* A name that climbs out of the folder would make the check read somewhere else. */
static bool is_inside(const char *name) {
    if (!*name || *name == '/') return false;
    for (const char *part = name; part; part = strchr(part, '/') ? strchr(part, '/') + 1 : NULL)
        if (!strncmp(part, "..", 2) && (part[2] == '/' || !part[2])) return false;
    return true;
}

static void read_files(struct arena *keep, struct bundle *bundle, const struct json *files, const char *where) {
    bundle->num_files = files->count / 2;
    bundle->files = take(keep, bundle->num_files, sizeof *bundle->files);
    for (size_t i = 0; i < bundle->num_files; i++) {
        const struct json *name = &files->items[2 * i], *about = &files->items[2 * i + 1];
        if (strlen(name->text) != name->count || !is_inside(name->text))
            fail(keep, REBUILD, "%s: files: '%s' is not a path inside the bundle", where, name->text);
        const char *place = format(keep, "%s: files: %s", where, name->text);
        const char *sha256 = need_text(keep, about, "sha256", place);
        bundle->files[i].name = take_text(keep, name->text, name->count);
        bundle->files[i].sha256 = take_text(keep, sha256, strlen(sha256));
        bundle->files[i].bytes = need_integer(keep, about, "bytes", 0, (int64_t)1 << 50, place);
    }
}

static const char *read_graph(struct arena *keep, const struct bundle *bundle, const struct json *manifest,
                              const char *role, const char *where) {
    const char *name = need_text(keep, need(keep, manifest, "graphs", JSON_OBJECT, where), role, where);
    for (size_t i = 0; i < bundle->num_files; i++)
        if (!strcmp(bundle->files[i].name, name)) return bundle->files[i].name;
    fail(keep, REBUILD, "%s: graphs.%s: '%s' is not among files", where, role, name);
}

static struct ids read_ids(struct arena *keep, const struct json *list, int64_t vocab_size, const char *where) {
    struct ids ids = {take(keep, list->count, sizeof *ids.items), list->count, list->count};
    for (uint32_t i = 0; i < list->count; i++)
        ids.items[i] = as_integer(keep, &list->items[i], 0, vocab_size - 1, where);
    return ids;
}

static void read_golden(struct arena *keep, struct bundle *bundle, const struct json *golden, const char *where) {
    bundle->num_golden = golden->count;
    bundle->golden = take(keep, golden->count, sizeof *bundle->golden);
    for (uint32_t i = 0; i < golden->count; i++) {
        const struct json *one = &golden->items[i], *margins = need(keep, one, "margins", JSON_ARRAY, where);
        struct golden_prompt *prompt = &bundle->golden[i];
        prompt->prompt = read_ids(keep, need(keep, one, "ids", JSON_ARRAY, where), bundle->vocab_size, where);
        prompt->tokens = read_ids(keep, need(keep, one, "tokens", JSON_ARRAY, where), bundle->vocab_size, where);
        int64_t total = (int64_t)(prompt->prompt.count + prompt->tokens.count);
        if (margins->count != prompt->tokens.count || !prompt->prompt.count || total > bundle->context_length)
            fail(keep, REBUILD, "%s: golden prompt %u: ids, tokens and margins do not fit together", where, i + 1);
        double *values = take(keep, margins->count, sizeof *values);
        for (uint32_t k = 0; k < margins->count; k++) {
            if (!is_kind(&margins->items[k], JSON_NUMBER))
                fail(keep, REBUILD, "%s: golden prompt %u: a margin is no number", where, i + 1);
            values[k] = margins->items[k].number;
        }
        prompt->margins = values;
    }
}

static const char *path_of(struct arena *arena, const struct bundle *bundle, const char *name) {
    return format(arena, "%s/%s", bundle->folder, name);
}

static void check_size(struct arena *arena, const struct bundle *bundle, const struct file_entry *file) {
    struct stat about;
    if (stat(path_of(arena, bundle, file->name), &about) || !S_ISREG(about.st_mode))
        fail(arena, REBUILD, "bundle %s: %s is missing", bundle->folder, file->name);
    if (about.st_size != file->bytes)
        fail(arena, REBUILD, "bundle %s: %s is %s: it has %lld bytes, the manifest says %lld", bundle->folder,
             file->name, about.st_size < file->bytes ? "cut short" : "changed", (long long)about.st_size,
             (long long)file->bytes);
}

static void read_model(struct arena *keep, struct bundle *bundle, const struct json *model, const char *where) {
    where = format(keep, "%s: model", where);
    bundle->vocab_size = need_integer(keep, model, "vocab_size", 1, 1 << 24, where);
    bundle->num_layers = need_integer(keep, model, "num_layers", 1, 10000, where);
    bundle->num_kv_heads = need_integer(keep, model, "num_kv_heads", 1, 10000, where);
    bundle->head_dim = need_integer(keep, model, "head_dim", 1, 10000, where);
    bundle->context_length = need_integer(keep, model, "context_length", 1, 1 << 28, where);
}

const struct bundle *read_bundle(struct arena *keep, struct arena *scratch, const char *folder) {
    struct bundle *bundle = take(keep, 1, sizeof *bundle);
    const char *path = format(keep, "%s/%s", folder, MANIFEST), *where = format(keep, "bundle manifest %s", path);
    struct stat about;
    bundle->folder = take_text(keep, folder, strlen(folder));
    if (stat(folder, &about)) fail(keep, NULL, "%s: not a bundle (%s)", folder, strerror(errno));
    if (!S_ISDIR(about.st_mode))
        fail(keep, NULL, "%s: not a bundle, it is a file; give the folder that holds " MANIFEST, folder);
    if (stat(path, &about)) fail(keep, NULL, "%s: not a bundle, it has no " MANIFEST, folder);
    const struct json *manifest = read_json(scratch, path);
    int64_t schema = need_integer(keep, manifest, "schema", 1, INT32_MAX, path);
    if (schema > SCHEMA)
        fail(keep, "use the bundle's own run.py, or a newer ryot",
             "%s: schema %lld is newer than %d, the newest that this program reads", path, (long long)schema, SCHEMA);
    read_files(keep, bundle, need(keep, manifest, "files", JSON_OBJECT, where), where);
    bundle->prefill = read_graph(keep, bundle, manifest, "prefill", where);
    bundle->decode = read_graph(keep, bundle, manifest, "decode", where);
    read_model(keep, bundle, need(keep, manifest, "model", JSON_OBJECT, where), where);
    const char *name = need_text(keep, manifest, "name", where), *cache = need_text(keep, manifest, "kv_dtype", where);
    const char *oldest = need_text(keep, manifest, "onnxruntime_min", where);
    bundle->name = take_text(keep, name, strlen(name));
    bundle->onnxruntime_min = take_text(keep, oldest, strlen(oldest));
    bundle->position_ids = is_true(need(keep, manifest, "position_ids", JSON_TRUE, where));
    const char *precision = need_text(keep, manifest, "precision", where);
    const struct json *bits = member(member(manifest, "quantization"), "dynamic_bits");
    bundle->fp32 = !strcmp(precision, "fp32");
    bundle->eight_bit_products = strstr(precision, "int8-dyn") && is_kind(bits, JSON_NUMBER) && bits->number == 8;
    bundle->int8_cache = !strcmp(cache, "int8");
    if (!bundle->int8_cache && strcmp(cache, "float32") != 0)
        fail(keep, REBUILD, "%s: kv_dtype: got '%s', expected one of float32, int8", where, cache);
    /* Manifests of before the field: the prefill graph of a pair with an int8 cache took no past. */
    bundle->prefill_takes_past = bundle->prefill == bundle->decode || !bundle->int8_cache;
    if (member(manifest, "prefill_takes_past"))
        bundle->prefill_takes_past = is_true(need(keep, manifest, "prefill_takes_past", JSON_TRUE, where));
    bundle->eos = read_ids(keep, need(keep, manifest, "eos_token_ids", JSON_ARRAY, where), bundle->vocab_size, where);
    bundle->bos = -1;
    if (!is_kind(member(manifest, "bos_token_id"), JSON_NULL))
        bundle->bos = need_integer(keep, manifest, "bos_token_id", 0, bundle->vocab_size - 1, where);
    read_golden(keep, bundle, need(keep, manifest, "golden", JSON_ARRAY, where), where);
    bundle->tolerance = need(keep, manifest, "tolerance", JSON_NUMBER, where)->number;
    for (size_t i = 0; i < bundle->num_files; i++) check_size(scratch, bundle, &bundle->files[i]);
    return bundle;
}

static bool text_needs(const struct bundle *bundle, const char *name) {
    size_t length = strlen(name);
    return !strcmp(name, bundle->prefill) || !strcmp(name, bundle->decode) ||
           (length > 5 && !strcmp(name + length - 5, ".data")) || !strcmp(name, "tokenizer.json") ||
           !strcmp(name, "tokenizer_config.json") || !strcmp(name, "special_tokens_map.json");
}

void check_files(struct arena *scratch, const struct bundle *bundle, bool all) {
    for (size_t i = 0; i < bundle->num_files; i++) {
        const struct file_entry *entry = &bundle->files[i];
        char found[65];
        if (!all && !text_needs(bundle, entry->name)) continue;
        FILE *file = fopen(path_of(scratch, bundle, entry->name), "rb");
        int reason = errno;
        bool hashed = file && hash_file(file, found);
        if (file) fclose(file);
        if (!hashed)
            fail(scratch, NULL, "bundle %s: %s cannot be read (%s)", bundle->folder, entry->name, strerror(reason));
        if (strcmp(found, entry->sha256) != 0)
            fail(scratch, REBUILD, "bundle manifest: sha256 of %s is %.12s..., expected %.12s...", entry->name, found,
                 entry->sha256);
    }
}
