import { effect, signal } from "@preact/signals";

export type Theme = "light" | "dark" | "system";

const STORAGE_KEY = "khaosz.theme";
const stored = localStorage.getItem(STORAGE_KEY);

export const theme = signal<Theme>(stored === "light" || stored === "dark" ? stored : "system");

effect(() => {
  if (theme.value === "system") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem(STORAGE_KEY);
  } else {
    document.documentElement.dataset.theme = theme.value;
    localStorage.setItem(STORAGE_KEY, theme.value);
  }
});
