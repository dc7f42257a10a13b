export const BUILD: string;
export const FILES: string[];
