import { defineConfig } from "vite";

// What is built goes into the Python package, which serves it; nothing is fetched from elsewhere.
export default defineConfig({
  base: "./",
  build: {
    outDir: "../khaosz/serve/page",
    emptyOutDir: true,
    target: "es2022",
    sourcemap: false,
    assetsInlineLimit: 0, // the Content-Security-Policy has no data: for scripts and styles
    modulePreload: { polyfill: false },
    reportCompressedSize: true,
  },
  server: {
    proxy: Object.fromEntries(
      ["/v1", "/tokenize", "/health", "/metrics"].map((path) => [path, "http://127.0.0.1:8000"]),
    ),
  },
});
