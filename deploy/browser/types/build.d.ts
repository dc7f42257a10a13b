/** What build.mjs puts into the scripts: the version of onnxruntime-web, the build's name, and the files of the page. */
declare const RUNTIME_VERSION: string;
declare const BUILD: string;
declare const FILES: string[];
