import { defineConfig } from "vite";

// The build goes into the Python package, which serves it without other hosts.
export default defineConfig({
  base: "./",
  build: {
    outDir: "../khaosz/serve/page",
    emptyOutDir: true,
    target: "es2022",
    sourcemap: false,
    assetsInlineLimit: 0, // the Content-Security-Policy forbids data: for scripts and styles
    modulePreload: { polyfill: false },
    reportCompressedSize: true,
  },
  server: {
    proxy: Object.fromEntries(
      ["/v1", "/tokenize", "/health", "/metrics"].map((path) => [path, "http://127.0.0.1:8000"]),
    ),
  },
});
